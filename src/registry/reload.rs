//! The reloader: plan, name, make room, load beside the live generation, warm up, ask the canary, swap, retire.
//!
//! One reload at a time, on a thread and a small pool that stand behind all others: the live generation answers all the
//! while, and whatever goes wrong leaves it where it is.

mod fitting;
mod in_place;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use super::canary::{Answers, Probes, examine};
use super::candidate::{
    Activation, Candidate, FitPacks, FreeMemory, Reload, ReloadFailure, ReloadOptions, ReloadReport, ReloadRequest, ReloadRunning,
    ReloadStep, Source,
};
use super::lease::wait_until_free;
use super::load_thread::{LoadThread, Pool};
use super::probing::ask;
use super::room::{Room, Swap, Way, decide};
use super::{CacheUse, Engine, Generation, GenerationState, NotHere, Registry, ReloadEvent, ReloadOutcome};
use crate::domain::Fingerprint;
use crate::lock::lock;
use crate::scorer::panic_message;

/// Starts reloads, one at a time. Clones are handles of the same.
#[derive(Clone)]
pub struct Reloader(Arc<Inner>);

struct Inner {
    engine: Engine,
    source: Arc<dyn Source>,
    options: ReloadOptions,
    free: FreeMemory,
    runtime: Handle,
    status: Mutex<Status>,
    thread: LoadThread,
    fit: OnceLock<FitPacks>,
}

#[derive(Default)]
struct Status {
    running: bool,
    /// Asked for while another one was running: by whom.
    again: Option<&'static str>,
}

/// Steps that only count come at most this often.
const STEP_EVERY: Duration = Duration::from_millis(200);

type Tell<'a> = &'a mut (dyn FnMut(ReloadStep) + Send);

impl Reloader {
    /// `runtime` runs the questions of the canary and the waits.
    pub fn new(engine: Engine, source: Arc<dyn Source>, options: ReloadOptions, free: FreeMemory, runtime: Handle) -> Self {
        let (status, thread, fit) = (Mutex::default(), LoadThread::new(options.threads), OnceLock::new());
        Self(Arc::new(Inner { engine, source, options, free, runtime, status, thread, fit }))
    }

    /// Starts a reload. `cause` says in the log who wanted it.
    pub fn start(&self, request: ReloadRequest, cause: &'static str) -> Result<Reload, ReloadRunning> {
        let mut status = self.status();
        if status.running {
            return Err(ReloadRunning);
        }
        let (steps, shown) = mpsc::unbounded_channel();
        let (end, ended) = oneshot::channel();
        let this = self.clone();
        let run = move |pool: &Pool| {
            let result = this.run_and_tell(pool, request, cause, &steps);
            drop(steps);
            // The next one may start as soon as somebody knows that this one has ended; whoever asked may have gone.
            let mut again = this.next();
            let _ = end.send(result);
            while let Some(cause) = again {
                let nobody = mpsc::unbounded_channel().0;
                let _ = this.run_and_tell(pool, ReloadRequest::default(), cause, &nobody);
                again = this.next();
            }
        };
        if let Err(error) = self.0.thread.run(run) {
            // The next attempt may find a thread again; this one has no end to wait for, which its caller sees.
            tracing::error!(%error, "no thread for a reload");
            return Ok(Reload { steps: shown, end: ended });
        }
        status.running = true;
        Ok(Reload { steps: shown, end: ended })
    }

    /// Wants a reload, now or once the running one has ended.
    pub fn trigger(&self, cause: &'static str) {
        if self.start(ReloadRequest::default(), cause).is_ok() {
            return;
        }
        let mut status = self.status();
        if status.running {
            status.again = Some(cause);
            return;
        }
        drop(status);
        // It has ended in between.
        let _ = self.start(ReloadRequest::default(), cause);
    }

    /// Makes a staged or held generation the live one.
    pub fn activate(&self, fingerprint: Fingerprint) -> Result<Arc<Generation>, NotHere> {
        self.registry().activate(fingerprint).inspect(|generation| self.activated(generation))
    }

    fn activated(&self, generation: &Generation) {
        self.take_up(generation);
        tracing::info!(fingerprint = %generation.fingerprint, generation = %generation.id, "activated");
        self.0.source.accepted(generation);
    }

    /// Changes the registry on a thread of the runtime. The one that loads stands behind all others, and might be kept from
    /// its next step for long just while it holds a lock that callers wait for.
    fn swap<T: Send + 'static>(&self, change: impl FnOnce(&Registry) -> T + Send + 'static) -> Result<T, ReloadFailure> {
        let (registry, runtime) = (self.registry().clone(), &self.0.runtime);
        let changed = runtime.spawn(async move { change(&registry) });
        runtime.block_on(changed).map_err(|error| failure(ReloadOutcome::Failed, format!("the swap did not end: {error}")))
    }

    fn registry(&self) -> &Registry {
        self.0.engine.registry()
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        lock(&self.0.status)
    }

    /// What to do after a reload; nothing more runs if nothing was asked for meanwhile.
    fn next(&self) -> Option<&'static str> {
        let mut status = self.status();
        let again = status.again.take();
        status.running = again.is_some();
        again
    }

    fn run_and_tell(
        &self,
        pool: &Pool,
        request: ReloadRequest,
        cause: &'static str,
        steps: &mpsc::UnboundedSender<ReloadStep>,
    ) -> Result<ReloadReport, ReloadFailure> {
        let (clock, metrics) = (self.0.engine.clock().clone(), self.registry().metrics());
        let started = clock.now();
        let span = tracing::debug_span!("reload", cause, fingerprint = tracing::field::Empty);
        let _reload = span.enter();
        metrics.reload_begins();
        let (mut last, mut stage) = (started, String::new());
        let mut tell = |step: ReloadStep| {
            let now = clock.now();
            let worth = step.stage != stage || !step.message.is_empty() || now.saturating_duration_since(last) >= STEP_EVERY;
            if worth {
                (last, stage) = (now, step.stage.clone());
                let _ = steps.send(step);
            }
        };
        let result = catch_unwind(AssertUnwindSafe(|| self.run(pool, request, &mut tell)));
        let result =
            result.unwrap_or_else(|panic| Err(failure(ReloadOutcome::Failed, format!("panicked: {}", panic_message(panic.as_ref())))));
        let took = clock.now().saturating_duration_since(started);
        metrics.reload_ends(took, clock.wall());
        let seconds = took.as_secs_f64();
        match &result {
            Ok(ReloadReport { outcome, message, generation }) => {
                let fingerprint = generation.as_ref().map(|(described, _)| described.fingerprint);
                if let Some(outcome) = *outcome {
                    metrics.reloaded(outcome);
                    self.registry().recent().reloaded(ReloadEvent { at: clock.wall(), outcome, fingerprint, problem: None });
                }
                let outcome = outcome.map_or("planned", ReloadOutcome::name);
                let fingerprint = fingerprint.map(|fingerprint| fingerprint.to_string());
                span.record("fingerprint", fingerprint.as_deref());
                tracing::info!(cause, outcome, fingerprint, seconds, message, "reload");
            }
            Err(ReloadFailure { outcome, message }) => {
                metrics.reloaded(*outcome);
                let event = ReloadEvent { at: clock.wall(), outcome: *outcome, fingerprint: None, problem: Some(message.clone()) };
                self.registry().recent().reloaded(event);
                tracing::error!(cause, outcome = outcome.name(), seconds, message, "reload failed, the live generation stays");
            }
        }
        result
    }

    fn run(&self, pool: &Pool, request: ReloadRequest, tell: Tell<'_>) -> Result<ReloadReport, ReloadFailure> {
        let Inner { source, options, free, .. } = &*self.0;
        let registry = self.registry();
        let pool = pool.as_ref().map_err(|error| failure(ReloadOutcome::Failed, format!("no threads to load with: {error}")))?;
        tell(step("plan", ""));
        let candidate = source.prepare(&mut |progress| tell(progress.into())).map_err(|problem| failure(ReloadOutcome::NoPlan, problem))?;
        let candidate = candidate.as_ref();
        tell(step("plan", candidate.summary()));
        registry.metrics().restart_needed(candidate.restart_needed().len());
        candidate.restart_needed().iter().for_each(|remark| tell(step("plan", format!("needs a restart: {remark}"))));

        let fingerprint = pool
            .install(|| candidate.fingerprint(&mut |progress| tell(progress.into())))
            .map_err(|problem| failure(ReloadOutcome::Failed, problem))?;
        tell(step("hash", format!("fingerprint {fingerprint}")));
        let mut stages = request.stage_only || options.activation == Activation::OnCall;
        if registry.here(fingerprint).is_some() {
            let equipment = pool.install(|| candidate.equipment()).map_err(|problem| failure(ReloadOutcome::Failed, problem))?;
            if let Some(report) = self.known(fingerprint, &equipment, request.dry_run, stages) {
                return Ok(report);
            }
            // The same model, equipped otherwise: no score changes, so there is nothing to wait for.
            stages &= registry.state_of(fingerprint) != Some(GenerationState::Live);
        }

        wait_until_free();
        let (live, idle) = registry.device_bytes();
        let (prefixes, live_prefixes) = (candidate.prefix_bytes(), registry.prefix_bytes());
        let room = Room { needed: candidate.device_bytes(), prefixes, free: free(), live, live_prefixes, idle };
        // What is staged stands beside the live one by its nature.
        let swap = if stages { Swap::Beside } else { options.swap };
        let way = decide(swap, room).map_err(|no_room| failure(ReloadOutcome::NoRoom, no_room))?;
        tell(step("room", way));
        if request.dry_run {
            return Ok(ReloadReport { outcome: None, message: format!("would be {way}; fingerprint {fingerprint}"), generation: None });
        }
        let generation = match way {
            Way::Beside => self.load(candidate, fingerprint, pool, None, tell)?,
            Way::BesideAfterRelease => {
                tell(step("release", "what is staged or held is freed"));
                if !self.wait(self.swap(Registry::release)?) {
                    let words = format!("requests still use what was held after {:?}", options.drain);
                    return Err(failure(ReloadOutcome::NoRoom, words));
                }
                self.load(candidate, fingerprint, pool, None, tell)?
            }
            Way::InPlace => self.load_in_place(candidate, fingerprint, pool, tell)?,
        };
        let unkept = match &generation.cache {
            CacheUse::Failed(problem) => format!("; its merged weights are not kept: {problem}"),
            _ => String::new(),
        };
        let described = generation.describe();
        if stages {
            tell(step("stage", ""));
            self.swap(move |registry| registry.stage(generation))?;
            let message = format!("staged: activate it by its fingerprint{unkept}");
            return Ok(ReloadReport {
                outcome: Some(ReloadOutcome::Staged),
                message,
                generation: Some((described, GenerationState::Staged)),
            });
        }
        tell(step("swap", ""));
        self.swap(move |registry| registry.install(generation))?;
        if let Some(live) = registry.serving(fingerprint) {
            self.take_up(&live);
            source.accepted(&live);
        }
        let message = format!("live{unkept}");
        Ok(ReloadReport { outcome: Some(ReloadOutcome::Loaded), message, generation: Some((described, GenerationState::Live)) })
    }

    /// What there is to do where the wanted generation is here already.
    fn known(&self, fingerprint: Fingerprint, equipment: &str, dry_run: bool, stages: bool) -> Option<ReloadReport> {
        let registry = self.registry();
        registry.here(fingerprint).filter(|generation| generation.equipment() == equipment)?;
        let here = || registry.list().into_iter().find(|(described, state)| described.fingerprint == fingerprint && is_here(*state));
        let unchanged = |message: &str| {
            let outcome = if dry_run { None } else { Some(ReloadOutcome::Unchanged) };
            Some(ReloadReport { outcome, message: message.to_owned(), generation: here() })
        };
        match registry.state_of(fingerprint)? {
            GenerationState::Live => unchanged("unchanged: this fingerprint is live"),
            GenerationState::Staged if stages => unchanged("unchanged: this fingerprint is staged already"),
            _ if stages => unchanged("unchanged: this fingerprint is held, and can be activated"),
            _ if dry_run => unchanged("would be activated: this fingerprint is staged or held"),
            _ => {
                // Gone in between, it is loaded like any other.
                let generation = self.swap(move |registry| registry.activate(fingerprint)).ok()?.ok()?;
                self.activated(&generation);
                let message = "live: it was staged or held".to_owned();
                Some(ReloadReport { outcome: Some(ReloadOutcome::Activated), message, generation: here() })
            }
        }
    }

    /// Loads a candidate and asks the canary. `live` are the live model's answers where it cannot be asked any more.
    fn load(
        &self,
        candidate: &dyn Candidate,
        fingerprint: Fingerprint,
        pool: &rayon::ThreadPool,
        live: Option<Answers>,
        tell: Tell<'_>,
    ) -> Result<Generation, ReloadFailure> {
        let id = self.registry().next_id();
        let generation = pool
            .install(|| candidate.load(id, &mut |progress| tell(progress.into())))
            .map_err(|problem| failure(ReloadOutcome::Failed, problem))?;
        if generation.fingerprint != fingerprint {
            let found = generation.fingerprint;
            let words = format!("files changed while they were read: fingerprint {fingerprint} was planned, {found} was loaded");
            return Err(failure(ReloadOutcome::Failed, words));
        }
        let (probes, bounds) = candidate.canary();
        tell(step("canary", format!("{} probes", probes.samples().len())));
        let live = match live {
            Some(answers) => Some(answers),
            None => self.live_answers(probes)?,
        };
        let answers = pool.install(|| ask(&generation, probes)).map_err(no_answer)?;
        let examined = examine(&answers, live.as_deref(), probes.preferences(), bounds);
        let figures = examined.as_ref().unwrap_or_else(|refused| &refused.figures);
        self.registry().metrics().canary(figures);
        tell(step("canary", figures));
        examined.map_err(|refused| failure(ReloadOutcome::Refused, refused))?;
        self.fit(pool, &generation);
        Ok(generation)
    }

    fn live_answers(&self, probes: &Probes) -> Result<Option<Answers>, ReloadFailure> {
        let Some(live) = self.registry().current() else { return Ok(None) };
        if let Some(answers) = live.answers.recall(probes.samples()) {
            return Ok(Some(answers));
        }
        let answers = self.0.runtime.block_on(self.0.engine.answers(&live, probes.samples())).map_err(no_answer)?;
        live.answers.remember(probes.samples(), &answers);
        Ok(Some(answers))
    }
}

fn is_here(state: GenerationState) -> bool {
    matches!(state, GenerationState::Staged | GenerationState::Live | GenerationState::Held)
}

fn step(stage: &str, message: impl ToString) -> ReloadStep {
    ReloadStep { stage: stage.to_owned(), done: 0, total: 0, message: message.to_string() }
}

fn failure(outcome: ReloadOutcome, message: impl ToString) -> ReloadFailure {
    ReloadFailure { outcome, message: message.to_string() }
}

fn no_answer(error: impl std::fmt::Display) -> ReloadFailure {
    failure(ReloadOutcome::Failed, format!("the canary got no answer: {error}"))
}

#[cfg(test)]
#[path = "reload_tests.rs"]
mod tests;
