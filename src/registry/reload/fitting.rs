//! How large packs may be, found anew for every generation: one that is larger than the last leaves less room.

use super::super::Generation;
use super::super::candidate::FitPacks;
use super::Reloader;

impl Reloader {
    /// Has every generation measured that is loaded from now on. What was set before stays.
    pub fn fit_packs(&self, fit: FitPacks) {
        let _ = self.0.fit.set(fit);
    }

    /// Measures a generation that nobody uses yet. What else is loaded goes when this one is live, or when it is in the way.
    pub(super) fn fit(&self, pool: &rayon::ThreadPool, generation: &Generation) {
        if let Some(fit) = self.0.fit.get() {
            let (live, idle) = self.registry().device_bytes();
            generation.set_pack_tokens(pool.install(|| fit(generation, live.saturating_add(idle))));
        }
    }

    /// It is live now, so packs are as large as was found for it.
    pub(super) fn take_up(&self, generation: &Generation) {
        if let Some(tokens) = generation.pack_tokens() {
            self.0.engine.scorer().set_max_pack_tokens(tokens);
        }
    }
}
