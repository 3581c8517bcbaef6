//! What has been made ready for a pack before its turn comes: the copies that a forward needs on its device, made by another
//! thread while the pack before it is computed.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Which model on which device something is ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u64);

impl Owner {
    /// One that there has not been before.
    pub fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }
}

/// At most one thing, for at most one owner. A copy of a pack has nothing ready.
#[derive(Default)]
pub struct Ready(Mutex<Option<(Owner, Box<dyn Any + Send>)>>);

impl Ready {
    pub fn put(&self, owner: Owner, thing: impl Any + Send) {
        *self.lock() = Some((owner, Box::new(thing)));
    }

    /// What was put there for this owner. What is there for another stays.
    pub fn take<T: Any>(&self, owner: Owner) -> Option<T> {
        let mut ready = self.lock();
        let (_, thing) = ready.take_if(|(known, _)| *known == owner)?;
        thing.downcast().ok().map(|thing| *thing)
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Owner, Box<dyn Any + Send>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clone for Ready {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ready").field(&self.lock().as_ref().map(|(owner, _)| *owner)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ready_is_taken_once_and_by_its_owner() {
        let (ready, owner, other) = (Ready::default(), Owner::new(), Owner::new());
        ready.put(owner, 5u32);
        assert_eq!((ready.take::<u32>(other), ready.clone().take::<u32>(owner)), (None, None));
        assert_eq!((ready.take::<u32>(owner), ready.take::<u32>(owner)), (Some(5), None));
        ready.put(owner, 6u32);
        ready.put(other, "seven");
        assert_eq!((ready.take::<u32>(owner), ready.take::<&str>(other)), (None, Some("seven")));
    }
}
