//! The thread that loads, and its small pool: both stand behind whoever answers, and are there for good. An allocator keeps
//! memory by thread, so each load takes what the one before has freed, where new threads would take more.
//!
//! Where others want the processor without a pause, what stands behind all of them gets next to nothing, and a load would not
//! end. A thread cannot take back a place that it has given up, so such a load runs on a second thread and pool, which are
//! only nice: they take a small part of the time from everybody.

use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use crate::scorer::{stand_back_far, stand_last, starved};

/// Threads that read, merge and hash; or why there are none.
pub(super) type Pool = Result<rayon::ThreadPool, rayon::ThreadPoolBuildError>;

type Job = Box<dyn FnOnce(&Pool) + Send>;

/// Started with its first job; ends when this is dropped and the last job is done.
#[derive(Debug)]
pub(super) struct LoadThread {
    threads: usize,
    /// Whether a thread that stands last gets too little of the processor for a load.
    starved: fn() -> bool,
    started: OnceLock<Started>,
}

/// What takes jobs for threads that stand last, and for threads that are only nice.
#[derive(Debug)]
struct Started {
    last: Sender<Job>,
    nice: Sender<Job>,
}

impl LoadThread {
    /// With so many threads in its pool.
    pub fn new(threads: usize) -> Self {
        Self::judging_by(starved, threads)
    }

    fn judging_by(starved: fn() -> bool, threads: usize) -> Self {
        Self { threads: threads.max(1), starved, started: OnceLock::new() }
    }

    /// Runs a job behind those before it. The error is that of a thread that cannot be started; the next job tries again.
    pub fn run(&self, job: impl FnOnce(&Pool) + Send + 'static) -> std::io::Result<()> {
        let started = match self.started.get() {
            Some(started) => started,
            None => {
                let started = self.start()?;
                self.started.get_or_init(|| started)
            }
        };
        let (starved, nice) = (self.starved, started.nice.clone());
        let judged = move |pool: &Pool| if starved() { run_nicely(&nice, job, pool) } else { job(pool) };
        started.last.send(Box::new(judged)).map_err(|_| std::io::Error::other("the thread that loads has ended"))
    }

    /// Both threads, by a thread that stands ahead: a new one begins where its maker stands.
    fn start(&self) -> std::io::Result<Started> {
        let last = loader("warm-reload", stand_last, self.threads)?;
        Ok(Started { last, nice: loader("warm-reload-up", stand_back_far, self.threads)? })
    }
}

/// Runs a job to its end on threads that are only nice, or with this pool where those have ended.
fn run_nicely(nice: &Sender<Job>, job: impl FnOnce(&Pool) + Send + 'static, own: &Pool) {
    tracing::info!("the processor is busy without a pause, so this load takes a small part of it from everybody");
    let (done, ended) = channel::<()>();
    let all = Box::new(move |pool: &Pool| {
        job(pool);
        drop(done);
    });
    match nice.send(all) {
        // Nothing is ever sent: the end of the job ends this.
        Ok(()) => _ = ended.recv(),
        Err(back) => back.0(own),
    }
}

/// A thread, and a pool with its first job, that stand where they are told to, for jobs one after the other.
fn loader(name: &'static str, stand: fn(), threads: usize) -> std::io::Result<Sender<Job>> {
    let pool = move || {
        let name = move |i| format!("{name}-{i}");
        rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name).start_handler(move |_| stand()).build()
    };
    let (sender, jobs) = channel::<Job>();
    let run = move || {
        stand();
        let mut own = None;
        for job in jobs {
            // Threads that could not be had may be there now.
            let ready = own.take().filter(Pool::is_ok).unwrap_or_else(pool);
            job(own.insert(ready));
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map(|_| sender)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_jobs_run_on_one_thread_and_one_pool() {
        let thread = LoadThread::judging_by(|| false, 1);
        let (told, ran) = channel();
        for _ in 0..3 {
            let told = told.clone();
            let id = || std::thread::current().id();
            let job = move |pool: &Pool| told.send((id(), pool.as_ref().map(|pool| pool.install(id)).ok())).expect("listens");
            thread.run(job).expect("a thread");
        }
        let ran: Vec<_> = (0..3).map(|_| ran.recv().expect("ran")).collect();
        assert_eq!((ran[1], ran[2]), (ran[0], ran[0]));
        assert!(ran[0].1.is_some_and(|pooled| pooled != ran[0].0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn whatever_a_load_does_stands_behind_those_that_answer() {
        use crate::scorer::stands_last;
        let (told, ran) = channel();
        let job =
            move |pool: &Pool| told.send((stands_last(), pool.as_ref().is_ok_and(|pool| pool.install(stands_last)))).expect("listens");
        LoadThread::judging_by(|| false, 2).run(job).expect("a thread");
        assert_eq!(ran.recv().expect("ran"), (true, true));
        assert!(!stands_last());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn where_nothing_is_left_for_a_load_it_runs_on_threads_that_are_only_nice_and_in_its_turn() {
        use crate::scorer::{niceness, stands_last};
        static JUDGED: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        // The second and the third of four find a busy machine.
        let starved = || (1..3).contains(&JUDGED.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let thread = LoadThread::judging_by(starved, 1);
        let (told, ran) = channel();
        for i in 0..4 {
            let told = told.clone();
            let stand = || (stands_last(), niceness());
            let job = move |pool: &Pool| {
                let pooled = pool.as_ref().map(|pool| pool.install(stand)).ok();
                told.send((i, stand(), pooled, std::thread::current().id())).expect("listens");
            };
            thread.run(job).expect("a thread");
        }
        let ran: Vec<_> = (0..4).map(|_| ran.recv().expect("ran")).collect();
        assert_eq!(ran.iter().map(|(i, ..)| *i).collect::<Vec<_>>(), [0, 1, 2, 3], "one behind the other");
        assert_eq!(ran.iter().map(|(_, (last, _), ..)| *last).collect::<Vec<_>>(), [true, false, false, true]);
        assert!(ran.iter().all(|(_, own, pooled, _)| *pooled == Some(*own) && own.1 == (niceness() + 15).min(19)), "{ran:?}");
        assert!(ran[1].3 == ran[2].3 && ran[0].3 == ran[3].3, "both are there for good");
    }
}
