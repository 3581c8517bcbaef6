//! What a recipe names that lies elsewhere, brought here: the one way of all who open recipes.

use super::recipe::Recipe;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::remote::{Fetched, is_remote};

/// What gives a copy of a place that lies elsewhere.
pub type Fetch<'f> = dyn FnMut(&str) -> Result<Fetched, CheckpointError> + 'f;

/// Who is told how far a download has come: the place, bytes that are there, and bytes in all.
pub type Downloads<'d> = &'d mut dyn FnMut(&str, u64, u64);

/// Makes every place of a recipe one of this machine, in the recipe's order: members with their bases, then init. The
/// resolved recipe goes on to name where it was, by its commit.
pub fn localize(recipe: &mut Recipe, fetch: &mut Fetch<'_>) -> Result<(), CheckpointError> {
    for (path, origin) in recipe.places_mut().filter(|(path, _)| is_remote(path)) {
        let Fetched { folder, origin: named } = fetch(&path.to_string_lossy())?;
        (*path, *origin) = (folder, Some(named));
    }
    Ok(())
}
