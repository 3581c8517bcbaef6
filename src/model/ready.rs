//! What has been made ready for a pack before its turn comes: the copies that a forward needs on its device, made by another
//! thread while the pack before it is computed.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex};

use super::device::Backend;
use crate::checkpoint::{Architecture, Readout};
use crate::lock::lock;

/// Which models need the same beside their weights: those that compute alike on one device, and read alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(blake3::Hash);

impl Kind {
    pub fn of(backend: &Backend, architecture: &Architecture, readout: &Readout) -> Self {
        // All that these are stands in how they are written.
        let words = format!("{} {:?} {architecture:?} {readout:?}", backend.describe(), backend.arithmetic());
        Self(blake3::hash(words.as_bytes()))
    }
}

/// One thing for every kind of model that a pack is given to, for as long as there is the pack. A copy of a pack has nothing ready.
#[derive(Default)]
pub struct Ready(Mutex<Vec<(Kind, Arc<dyn Any + Send + Sync>)>>);

impl Ready {
    /// Puts it there where there is none.
    pub fn put(&self, kind: Kind, thing: impl Any + Send + Sync) {
        lock(&self.0).push((kind, Arc::new(thing)));
    }

    pub fn forget(&self, kind: Kind) {
        lock(&self.0).retain(|(known, _)| *known != kind);
    }

    pub fn has(&self, kind: Kind) -> bool {
        lock(&self.0).iter().any(|(known, _)| *known == kind)
    }

    /// What was put there for this kind.
    pub fn get<T: Any + Send + Sync>(&self, kind: Kind) -> Option<Arc<T>> {
        let ready = lock(&self.0);
        let (_, thing) = ready.iter().find(|(known, _)| *known == kind)?;
        Arc::clone(thing).downcast().ok()
    }
}

impl Clone for Ready {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(lock(&self.0).iter().map(|(kind, _)| *kind)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ready_is_there_for_all_of_its_kind_and_for_no_other() {
        let [kind, other] = ["one", "other"].map(|name| Kind(blake3::hash(name.as_bytes())));
        let ready = Ready::default();
        ready.put(kind, 5u32);
        assert_eq!((ready.get::<u32>(other), ready.clone().get::<u32>(kind)), (None, None));
        assert_eq!((ready.get::<u32>(kind).as_deref(), ready.get::<u32>(kind).as_deref()), (Some(&5), Some(&5)));
        assert_eq!((ready.has(kind), ready.has(other)), (true, false));
        ready.put(other, "seven");
        assert_eq!((ready.get::<u32>(kind).as_deref(), ready.get::<&str>(other).as_deref()), (Some(&5), Some(&"seven")));
        ready.forget(kind);
        assert_eq!((ready.has(kind), ready.has(other)), (false, true));
    }
}
