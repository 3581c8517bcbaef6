//! What the environment says of the hub that models come from.

use std::fmt;

/// Names and values; one of them is a secret, so they are not shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct HubVariables(pub Vec<(String, String)>);

impl fmt::Debug for HubVariables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}
