//! Who may take how much of what is bounded: a flood of one tenant leaves room for the others. Pure.
//!
//! Up to half of a bound anybody may take what is asked for. Above it, whoever holds more than an equal share waits, where
//! one share more than there are tenants is kept for whoever comes next.

use std::collections::HashMap;
use std::sync::Arc;

/// Tenants that one peer may name at once, beside itself: a fresh name for every call is no share of its own. Calls of
/// further names are the peer's.
const NAMES_PER_PEER: usize = 16;

/// Whose call it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// By its own word.
    pub named: Option<Arc<str>>,
    /// Where it comes from.
    pub peer: Option<Arc<str>>,
}

/// What somebody holds, or may hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub requests: u64,
    pub bytes: u64,
    pub tokens: u64,
}

/// What is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    Requests,
    Bytes,
    Tokens,
}

impl Held {
    pub fn of(&self, resource: Resource) -> u64 {
        match resource {
            Resource::Requests => self.requests,
            Resource::Bytes => self.bytes,
            Resource::Tokens => self.tokens,
        }
    }

    /// With `new` in the place of `old`, which is part of it.
    fn replaced(self, old: Held, new: Held) -> Self {
        Self {
            requests: self.requests - old.requests + new.requests,
            bytes: self.bytes - old.bytes + new.bytes,
            tokens: self.tokens - old.tokens + new.tokens,
        }
    }
}

/// Why something is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// So much is held by all others.
    Full { held: u64 },
    /// So much is held by the tenant itself, which is more than its share.
    Share { held: u64, share: u64 },
}

/// What is held by whom.
#[derive(Debug, Default)]
pub struct Shares {
    all: Held,
    tenants: HashMap<Arc<str>, Tenant>,
    /// Names that have something in flight, by the peer that brought them.
    named: HashMap<Arc<str>, usize>,
}

#[derive(Debug, Default)]
struct Tenant {
    held: Held,
    /// Who brought the name.
    peer: Option<Arc<str>>,
}

impl Shares {
    pub fn all(&self) -> Held {
        self.all
    }

    /// The tenant that a call belongs to; none where nobody says.
    pub fn tenant(&self, caller: &Caller) -> Option<Arc<str>> {
        let Some(name) = &caller.named else { return caller.peer.clone() };
        let Some(peer) = &caller.peer else { return Some(name.clone()) };
        let full = self.named.get(peer).is_some_and(|&names| names >= NAMES_PER_PEER);
        Some(if full && !self.tenants.contains_key(name) { peer.clone() } else { name.clone() })
    }

    /// Tokens that stand before what a tenant asks for now: tenants take turns, so it waits for the others as long as for
    /// itself, and never for more than all.
    pub fn ahead(&self, tenant: Option<&str>) -> u64 {
        let own = tenant.map(|tenant| self.tenants.get(tenant).map_or(0, |tenant| tenant.held.tokens));
        let waiting = || self.tenants.values().filter(|tenant| tenant.held.tokens > 0).count() as u64;
        own.map_or(self.all.tokens, |own| own.saturating_mul(waiting()).min(self.all.tokens))
    }

    /// Whether a tenant finds room for `new` of a resource in the place of `old`, which it holds. What belongs to nobody has
    /// no share and is under the bound alone. A tenant that stays below its share is let in over a full bound where another
    /// is above its own; not so with bytes, which are memory.
    pub fn room(&self, tenant: Option<&str>, resource: Resource, bound: u64, old: u64, new: u64) -> Result<(), Refusal> {
        let others = self.all.of(resource) - old;
        // Whoever is alone always fits, and nobody is refused for what is there already.
        if new <= old || others == 0 && resource != Resource::Requests {
            return Ok(());
        }
        let full = others.saturating_add(new) > bound;
        let Some(tenant) = tenant else { return if full { Err(Refusal::Full { held: others }) } else { Ok(()) } };
        let here = self.tenants.get(tenant);
        let own = here.map_or(0, |here| here.held.of(resource)) - old;
        let count = self.tenants.len() as u64 + u64::from(here.is_none());
        let share = bound / (count + 1);
        let displaces = || resource != Resource::Bytes && own.saturating_add(new) <= share;
        let above = || self.tenants.values().any(|tenant| tenant.held.of(resource) > share);
        if full && !(displaces() && above()) {
            return Err(Refusal::Full { held: others });
        }
        if others.saturating_add(new) > bound / 2 && own > share {
            return Err(Refusal::Share { held: own, share });
        }
        Ok(())
    }

    /// Puts `new` in the place of `old`, which a tenant holds.
    pub fn replace(&mut self, tenant: Option<&Arc<str>>, peer: Option<&Arc<str>>, old: Held, new: Held) {
        self.all = self.all.replaced(old, new);
        let Some(name) = tenant else { return };
        let named = &mut self.named;
        let here = self.tenants.entry(name.clone()).or_insert_with(|| {
            let peer = peer.filter(|peer| *peer != name).cloned();
            if let Some(peer) = &peer {
                *named.entry(peer.clone()).or_default() += 1;
            }
            Tenant { held: Held::default(), peer }
        });
        here.held = here.held.replaced(old, new);
        if here.held.requests > 0 {
            return;
        }
        let peer = self.tenants.remove(name).and_then(|tenant| tenant.peer);
        if let Some(peer) = peer
            && let Some(names) = self.named.get_mut(&peer)
        {
            *names -= 1;
            if *names == 0 {
                self.named.remove(&peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUND: u64 = 60;

    fn one(tokens: u64) -> Held {
        Held { requests: 1, bytes: tokens, tokens }
    }

    fn caller(named: &str, peer: &str) -> Caller {
        Caller { named: Some(named.into()), peer: Some(peer.into()) }
    }

    #[test]
    fn a_flood_of_one_tenant_leaves_room_for_another() {
        let (mut shares, flood, other) = (Shares::default(), Arc::from("flood"), Arc::from("other"));
        let mut let_in = 0;
        while shares.room(Some(&flood), Resource::Requests, BOUND, 0, 1).is_ok() {
            shares.replace(Some(&flood), None, Held::default(), one(1));
            let_in += 1;
        }
        assert_eq!(let_in, BOUND / 2 + 1);
        for _ in 0..BOUND / 3 {
            shares.room(Some(&other), Resource::Requests, BOUND, 0, 1).expect("below its share");
            shares.replace(Some(&other), None, Held::default(), one(1));
        }
    }

    #[test]
    fn a_fresh_name_for_every_call_is_no_share_of_its_own() {
        let mut shares = Shares::default();
        let mut tenants = std::collections::HashSet::new();
        for i in 0..100 {
            let (caller, peer) = (caller(&format!("name-{i}"), "peer"), Arc::from("peer"));
            let tenant = shares.tenant(&caller).expect("named");
            shares.replace(Some(&tenant), Some(&peer), Held::default(), one(1));
            tenants.insert(tenant);
        }
        assert_eq!(tenants.len(), NAMES_PER_PEER + 1);
        for tenant in &tenants {
            let held = shares.tenants[tenant].held;
            shares.replace(Some(tenant), None, held, Held::default());
        }
        assert!(shares.tenants.is_empty() && shares.named.is_empty() && shares.all == Held::default());
    }

    proptest! {
        #[test]
        fn a_tenant_below_its_share_is_never_refused_while_another_is_above(
            steps in prop::collection::vec((0usize..6, 0u64..12, any::<bool>()), 1..200),
        ) {
            let names: Vec<Arc<str>> = (0..6).map(|i| Arc::from(format!("t{i}"))).collect();
            let (mut shares, mut open) = (Shares::default(), Vec::<(usize, Held)>::new());
            for (who, tokens, ends) in steps {
                if ends && !open.is_empty() {
                    let (who, held) = open.swap_remove(who % open.len());
                    shares.replace(Some(&names[who]), None, held, Held::default());
                    continue;
                }
                let held = |who: usize| shares.tenants.get(&names[who]).map_or(0, |tenant| tenant.held.tokens);
                let count = shares.tenants.len() + usize::from(!shares.tenants.contains_key(&names[who]));
                let share = BOUND / (count as u64 + 1);
                let answer = shares.room(Some(&names[who]), Resource::Tokens, BOUND, 0, tokens);
                let above = (0..6).any(|other| other != who && held(other) > share);
                if held(who) + tokens <= share && above {
                    prop_assert_eq!(answer, Ok(()));
                }
                if answer.is_ok() {
                    // Nobody goes beyond its share once half is taken, but by the last of what it asked for.
                    prop_assert!(held(who) <= share || shares.all.tokens + tokens <= BOUND / 2 || shares.all.tokens == 0 || tokens == 0);
                    shares.replace(Some(&names[who]), None, Held::default(), one(tokens));
                    open.push((who, one(tokens)));
                }
                let summed = open.iter().map(|(_, held)| held.tokens).sum::<u64>();
                prop_assert_eq!(shares.all, Held { requests: open.len() as u64, bytes: summed, tokens: summed });
            }
        }
    }
}
