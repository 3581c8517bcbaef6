//! A generation in the place of the live one, where there is no room beside it.

use std::sync::{Arc, Weak};

use super::super::candidate::{Candidate, ReloadFailure};
use super::super::{Generation, LeaseEnd, Registry, ReloadOutcome};
use super::{Reloader, Tell, failure, step};
use crate::domain::Fingerprint;

impl Reloader {
    /// Frees everything, then loads. Whatever fails after that point, the last good generation is loaded once more.
    pub(super) fn load_in_place(
        &self,
        candidate: &dyn Candidate,
        fingerprint: Fingerprint,
        pool: &rayon::ThreadPool,
        tell: Tell<'_>,
    ) -> Result<Generation, ReloadFailure> {
        let registry = self.registry();
        let live = self.live_answers(candidate.canary().0)?;
        tell(step("drain", "not answering until the new generation is there"));
        let before = registry.current().as_ref().map_or_else(Weak::new, Arc::downgrade);
        if !self.wait(self.swap(Registry::vacate)?) {
            // Requests that do not end keep the old weights, so they may as well be used.
            if let Some(before) = before.upgrade() {
                self.swap(move |registry| registry.come_back(before))?;
                let words = format!("requests still use the live generation after {:?}: it stays", self.0.options.drain);
                return Err(failure(ReloadOutcome::NoRoom, words));
            }
        }
        // Without a live model there is nothing to compare with, which no answers say.
        let live = live.unwrap_or_default();
        self.load(candidate, fingerprint, pool, Some(live), tell).map_err(|problem| {
            tell(step("restore", &problem));
            match self.restore(pool, tell) {
                Ok(()) => problem,
                Err(worse) => failure(problem.outcome, format!("{problem}; and the last good generation does not come back: {worse}")),
            }
        })
    }

    fn restore(&self, pool: &rayon::ThreadPool, tell: Tell<'_>) -> Result<(), String> {
        let candidate = self.0.source.last_good(&mut |progress| tell(progress.into()))?;
        let id = self.registry().next_id();
        let generation = pool.install(|| candidate.load(id, &mut |progress| tell(progress.into())))?;
        self.fit(pool, &generation);
        let fingerprint = generation.fingerprint;
        tracing::warn!(fingerprint = %generation.fingerprint, "the last good generation is back");
        self.registry().metrics().reloaded(ReloadOutcome::Restored);
        self.swap(move |registry| registry.install(generation)).map_err(|failed| failed.message)?;
        self.registry().serving(fingerprint).iter().for_each(|live| self.take_up(live));
        Ok(())
    }

    /// Whether all of these ended in time.
    pub(super) fn wait(&self, ends: Vec<LeaseEnd>) -> bool {
        let clock = self.0.engine.clock();
        let deadline = clock.now() + self.0.options.drain;
        let all = async {
            for end in ends {
                end.comes().await;
            }
        };
        self.0.runtime.block_on(async {
            tokio::select! {
                biased;
                () = all => true,
                () = clock.sleep_until(deadline) => false,
            }
        })
    }
}
