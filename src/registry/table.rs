//! Which generation is staged, live, held or on its way out. Pure: what is swapped is a parameter, and nothing waits.

use std::collections::VecDeque;
use std::sync::Arc;

/// Where a generation is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GenerationState {
    /// Loaded and checked, waiting to be made live.
    Staged,
    /// Scores requests that name no fingerprint.
    Live,
    /// Was live; scores requests that name its fingerprint.
    Held,
    /// Finishes its last requests.
    Retiring,
    /// Its memory is free.
    Gone,
}

impl GenerationState {
    pub const ALL: [Self; 5] = [Self::Staged, Self::Live, Self::Held, Self::Retiring, Self::Gone];

    /// The name used in metric labels and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Live => "live",
            Self::Held => "held",
            Self::Retiring => "retiring",
            Self::Gone => "gone",
        }
    }
}

/// What tells generations apart: the same key is the same model.
pub trait Keyed {
    type Key: PartialEq + Copy;

    fn key(&self) -> Self::Key;
}

/// One live generation, at most one staged, and some that were live before.
#[derive(Debug)]
pub struct Table<G> {
    keep: usize,
    live: Option<Arc<G>>,
    staged: Option<Arc<G>>,
    /// The one that was live last comes first.
    held: VecDeque<Arc<G>>,
}

impl<G: Keyed> Table<G> {
    /// Nothing is live. `keep` generations are held after they were live.
    pub fn new(keep: usize) -> Self {
        Self { keep, live: None, staged: None, held: VecDeque::new() }
    }

    pub fn live(&self) -> Option<&Arc<G>> {
        self.live.as_ref()
    }

    /// The generation that scores requests which name `key`: live or held.
    pub fn serving(&self, key: G::Key) -> Option<&Arc<G>> {
        self.live.iter().chain(&self.held).find(|generation| generation.key() == key)
    }

    /// All that are here, with their states.
    pub fn all(&self) -> impl Iterator<Item = (&Arc<G>, GenerationState)> {
        let staged = self.staged.iter().map(|generation| (generation, GenerationState::Staged));
        let live = self.live.iter().map(|generation| (generation, GenerationState::Live));
        let held = self.held.iter().map(|generation| (generation, GenerationState::Held));
        staged.chain(live).chain(held)
    }

    pub fn state(&self, key: G::Key) -> Option<GenerationState> {
        self.all().find_map(|(generation, state)| (generation.key() == key).then_some(state))
    }

    /// Makes a generation the live one; what is not needed any more comes back. Another one of the same key goes, because
    /// two of one name would be one too many.
    pub fn install(&mut self, generation: Arc<G>) -> Vec<Arc<G>> {
        let mut out = self.take(generation.key());
        if let Some(before) = self.live.replace(generation) {
            self.held.push_front(before);
        }
        out.extend(self.shrink());
        out
    }

    /// Keeps a generation ready beside the live one, in the place of the one that was staged before, and of any other of
    /// its key. In the place of the live one it is the same model, and live at once.
    pub fn stage(&mut self, generation: Arc<G>) -> Vec<Arc<G>> {
        if self.live.as_ref().is_some_and(|live| live.key() == generation.key()) {
            return self.install(generation);
        }
        let mut out = self.take(generation.key());
        out.extend(self.staged.replace(generation));
        out
    }

    /// Makes the staged or a held generation of this key the live one. `None` if neither is there; the live one stays
    /// what it is.
    pub fn activate(&mut self, key: G::Key) -> Option<(Arc<G>, Vec<Arc<G>>)> {
        match self.state(key)? {
            GenerationState::Live => self.live.clone().map(|live| (live, Vec::new())),
            _ => {
                let generation = self.take(key).pop()?;
                Some((generation.clone(), self.install(generation)))
            }
        }
    }

    /// Lets go of everything but the live generation.
    pub fn release(&mut self) -> Vec<Arc<G>> {
        self.staged.take().into_iter().chain(self.held.drain(..)).collect()
    }

    /// Lets go of everything.
    pub fn vacate(&mut self) -> Vec<Arc<G>> {
        let live = self.live.take();
        live.into_iter().chain(self.release()).collect()
    }

    /// Removes everything of this key.
    fn take(&mut self, key: G::Key) -> Vec<Arc<G>> {
        let mut out = Vec::new();
        if self.staged.as_ref().is_some_and(|staged| staged.key() == key) {
            out.extend(self.staged.take());
        }
        while let Some(index) = self.held.iter().position(|held| held.key() == key) {
            out.extend(self.held.remove(index));
        }
        if self.live.as_ref().is_some_and(|live| live.key() == key) {
            out.extend(self.live.take());
        }
        out
    }

    fn shrink(&mut self) -> Vec<Arc<G>> {
        self.held.split_off(self.keep.min(self.held.len())).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug)]
    struct Fake {
        key: u8,
        id: usize,
    }

    impl Keyed for Fake {
        type Key = u8;

        fn key(&self) -> u8 {
            self.key
        }
    }

    fn fake(key: u8) -> Arc<Fake> {
        Arc::new(Fake { key, id: 0 })
    }

    fn keys(generations: &[Arc<Fake>]) -> Vec<u8> {
        generations.iter().map(|generation| generation.key).collect()
    }

    #[test]
    fn what_was_live_is_held_and_what_was_held_goes() {
        let mut table = Table::new(1);
        assert!(table.install(fake(1)).is_empty());
        assert!(table.install(fake(2)).is_empty());
        assert_eq!((table.state(1), table.state(2)), (Some(GenerationState::Held), Some(GenerationState::Live)));
        assert!(table.serving(1).is_some() && table.serving(2).is_some());
        assert_eq!(keys(&table.install(fake(3))), [1]);
        assert_eq!(table.state(1), None);
    }

    #[test]
    fn what_is_staged_serves_nobody_until_it_is_activated() {
        let mut table = Table::new(1);
        table.install(fake(1));
        table.stage(fake(2));
        assert!(table.serving(2).is_none());
        assert_eq!(keys(&table.stage(fake(3))), [2], "one at a time");
        let (now, out) = table.activate(3).expect("staged");
        assert_eq!((now.key, out.len(), table.state(1)), (3, 0, Some(GenerationState::Held)));
        // Going back is the same call, and forth again, too.
        for key in [1, 3, 3] {
            assert_eq!(table.activate(key).expect("here").1.len(), 0);
            assert_eq!(table.live().map(|live| live.key), Some(key));
        }
        assert!(table.activate(9).is_none());
        assert_eq!(table.live().map(|live| live.key), Some(3), "a wrong name changes nothing");
    }

    #[test]
    fn without_keep_nothing_is_held() {
        let mut table = Table::new(0);
        table.install(fake(1));
        assert_eq!(keys(&table.install(fake(2))), [1]);
        assert_eq!(keys(&table.vacate()), [2]);
        assert!(table.live().is_none());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_is_there_twice(
            keep in 0usize..3,
            steps in prop::collection::vec((0u8..5, 0u8..4), 1..40),
        ) {
            let mut table = Table::new(keep);
            let (mut made, mut out) = (0, Vec::new());
            for (action, key) in steps {
                let mut make = || {
                    made += 1;
                    Arc::new(Fake { key, id: made })
                };
                match action {
                    0 => out.extend(table.install(make())),
                    1 => {
                        let live = table.live().map(|live| live.key);
                        out.extend(table.stage(make()));
                        prop_assert_eq!(table.live().map(|live| live.key), live);
                    }
                    2 => {
                        let before = table.live().map(|live| live.id);
                        match table.activate(key) {
                            Some((now, gone)) => {
                                out.extend(gone);
                                prop_assert_eq!(table.live().map(|live| live.id), Some(now.id));
                            }
                            None => prop_assert_eq!(table.live().map(|live| live.id), before),
                        }
                    }
                    3 => out.extend(table.release()),
                    _ => out.extend(table.vacate()),
                }
                let here: Vec<_> = table.all().map(|(generation, _)| (generation.key, generation.id)).collect();
                let keys: std::collections::BTreeSet<_> = here.iter().map(|(key, _)| key).collect();
                prop_assert_eq!(keys.len(), here.len(), "each name once");
                let mut ids: Vec<_> = here.iter().map(|(_, id)| *id).chain(out.iter().map(|generation| generation.id)).collect();
                ids.sort_unstable();
                prop_assert_eq!(ids, (1..=made).collect::<Vec<_>>(), "everything is here or has come out, once");
                prop_assert!(table.all().filter(|(_, state)| *state == GenerationState::Held).count() <= keep);
            }
        }
    }
}
