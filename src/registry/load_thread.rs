//! The thread that loads, and its small pool: both stand behind whoever answers, and are there for good. An allocator keeps
//! memory by thread, so each load takes what the one before has freed, where new threads would take more.

use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use crate::scorer::stand_last;

/// Threads that read, merge and hash; or why there are none.
pub(super) type Pool = Result<rayon::ThreadPool, rayon::ThreadPoolBuildError>;

type Job = Box<dyn FnOnce(&Pool) + Send>;

/// Started with its first job; ends when this is dropped and the last job is done.
#[derive(Debug)]
pub(super) struct LoadThread {
    threads: usize,
    jobs: OnceLock<Sender<Job>>,
}

impl LoadThread {
    /// With so many threads in its pool.
    pub fn new(threads: usize) -> Self {
        Self { threads: threads.max(1), jobs: OnceLock::new() }
    }

    /// Runs a job behind those before it. The error is that of a thread that cannot be started; the next job tries again.
    pub fn run(&self, job: impl FnOnce(&Pool) + Send + 'static) -> std::io::Result<()> {
        let jobs = match self.jobs.get() {
            Some(jobs) => jobs,
            None => {
                let jobs = self.start()?;
                self.jobs.get_or_init(|| jobs)
            }
        };
        jobs.send(Box::new(job)).map_err(|_| std::io::Error::other("the thread that loads has ended"))
    }

    fn start(&self) -> std::io::Result<Sender<Job>> {
        let (sender, jobs) = channel::<Job>();
        let threads = self.threads;
        let run = move || {
            stand_last();
            let mut own = pool(threads);
            for job in jobs {
                if own.is_err() {
                    own = pool(threads);
                }
                job(&own);
            }
        };
        std::thread::Builder::new().name("warm-reload".to_owned()).spawn(run).map(|_| sender)
    }
}

fn pool(threads: usize) -> Pool {
    let name = |i| format!("warm-reload-{i}");
    rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name).start_handler(|_| stand_last()).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_jobs_run_on_one_thread_and_one_pool() {
        let thread = LoadThread::new(1);
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
        LoadThread::new(2).run(job).expect("a thread");
        assert_eq!(ran.recv().expect("ran"), (true, true));
        assert!(!stands_last());
    }
}
