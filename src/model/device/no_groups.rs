//! In place of `groups.rs` in a build without the feature `cuda`.

use super::grouped::Grouped;

pub fn on_card() -> Option<&'static dyn Grouped> {
    None
}
