//! Whose call it is: the name that is counted, billed and logged.
//!
//! The caller's tenant travels as metadata. Names come from outside, so their number is bounded: what has no place of its
//! own is counted as [`OTHER`].

use std::collections::BTreeSet;
use std::sync::Mutex;

use tonic::transport::server::TcpConnectInfo;

use crate::lock::lock;
use crate::scorer::Caller;

/// The metadata that names a tenant.
pub const TENANT_HEADER: &str = "x-gateway-inference-fairness-id";

/// More of a tenant's name than this does not tell it from others.
const MAX_TENANT_CHARS: usize = 128;

/// Whose share of what is bounded a call takes: by its metadata, and by where it comes from.
pub(super) fn caller<B>(request: &http::Request<B>) -> Caller {
    let named = request.headers().get(TENANT_HEADER).and_then(|value| value.to_str().ok()).filter(|name| !name.is_empty());
    let peer = request.extensions().get::<TcpConnectInfo>().and_then(|connection| connection.remote_addr());
    Caller {
        named: named.map(|name| name.chars().take(MAX_TENANT_CHARS).collect::<String>().into()),
        peer: peer.map(|peer| peer.ip().to_string().into()),
    }
}

/// Calls that name no tenant.
pub const NONE: &str = "none";
/// Calls of tenants that have no place of their own.
pub const OTHER: &str = "other";

/// Names that are counted by themselves, at most.
pub const MAX_TENANTS: usize = 32;
/// A longer name is not counted by itself.
const MAX_NAME_BYTES: usize = 64;

/// Which tenants have a name of their own.
#[derive(Debug)]
pub struct Tenants {
    /// Configured names are all there are; without any, the first ones that come are taken.
    open: bool,
    known: Mutex<BTreeSet<String>>,
}

impl Tenants {
    /// At most [`MAX_TENANTS`] of these names have places of their own; without names, the first that call do.
    pub fn new(configured: &[String]) -> Self {
        let known = configured.iter().filter(|name| is_name(name)).take(MAX_TENANTS).cloned().collect();
        Self { open: configured.is_empty(), known: Mutex::new(known) }
    }

    /// The names that have places now, beside [`NONE`] and [`OTHER`].
    pub fn names(&self) -> Vec<String> {
        self.known().iter().cloned().collect()
    }

    /// The name that a call with these headers is counted under.
    pub fn of(&self, headers: &http::HeaderMap) -> String {
        let Some(value) = headers.get(TENANT_HEADER) else { return NONE.to_owned() };
        let Some(name) = value.to_str().ok().filter(|name| is_name(name)) else { return OTHER.to_owned() };
        let mut known = self.known();
        if self.open && known.len() < MAX_TENANTS && !known.contains(name) {
            known.insert(name.to_owned());
        }
        if known.contains(name) { name.to_owned() } else { OTHER.to_owned() }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        lock(&self.known)
    }
}

/// Whether a tenant may be called this.
pub fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic()) && name != NONE && name != OTHER
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(name: &str) -> http::HeaderMap {
        let mut headers = http::HeaderMap::new();
        headers.insert(TENANT_HEADER, http::HeaderValue::from_bytes(name.as_bytes()).expect("a header"));
        headers
    }

    #[test]
    fn configured_names_are_counted_and_the_rest_together() {
        let tenants = Tenants::new(&["team-a".to_owned(), "team-b".to_owned()]);
        assert_eq!(tenants.of(&headers("team-b")), "team-b");
        assert_eq!(tenants.of(&headers("team-c")), OTHER);
        assert_eq!(tenants.of(&http::HeaderMap::new()), NONE);
        assert_eq!(tenants.names(), ["team-a", "team-b"]);
    }

    #[test]
    fn a_name_cannot_pose_as_nobody() {
        let tenants = Tenants::new(&[]);
        assert_eq!(tenants.of(&headers("none")), OTHER);
        assert_eq!(tenants.of(&headers("other")), OTHER);
    }

    proptest! {
        #[test]
        fn whoever_calls_the_names_stay_few_and_short(names in prop::collection::vec("[ -~]{0,80}", 0..200)) {
            let tenants = Tenants::new(&[]);
            for name in &names {
                let counted = tenants.of(&headers(name));
                prop_assert!(counted == OTHER || counted == *name, "{counted} for {name}");
            }
            prop_assert!(tenants.names().len() <= MAX_TENANTS);
            prop_assert!(tenants.names().iter().all(|name| name.len() <= MAX_NAME_BYTES));
        }
    }
}
