//! What the environment says of the hubs and buckets that models come from.

use std::fmt;

/// Names and values; some of them are secrets, so they are not shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RemoteVariables(pub Vec<(String, String)>);

impl fmt::Debug for RemoteVariables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}
