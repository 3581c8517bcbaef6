//! Whether a folder holds the merge of a recipe already, by the names in its record: nothing is downloaded or opened for that.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::places::{Fetch, localize};
use super::provenance::{RECORD_FILE, earlier};
use super::recipe::{Recipe, is_recipe};
use super::write::{WriteError, check_place};
use crate::checkpoint::remote::{Fetched, Remotes, is_remote};

/// Recipes that one recipe leads to; one that leads back to itself leads to more.
const MAX_RECIPES: usize = 1024;

/// The weights_id of the merge that `place` holds, if its record names this recipe as it resolves now: the same members at the
/// same commits, and the same recipes within. `None` where nothing stands there; another recipe, or what is no merge, is an
/// error. Bytes behind the same names are not compared.
pub fn written_before(recipe: &Recipe, place: &Path, remotes: &Remotes) -> Result<Option<String>, WriteError> {
    if check_place(place, false).is_ok() {
        return Ok(None);
    }
    let wrong = |problem: String| WriteError::Refused(format!("{}: {problem}", place.display()));
    let record =
        earlier(place).ok_or_else(|| wrong(format!("stands there already, and is no merge of this program (no {RECORD_FILE})")))?;
    let mut name = |place: &str| Ok(Fetched { folder: PathBuf::from(place), origin: remotes.origin(place)? });
    let mut wanted = Vec::new();
    resolve(recipe, &mut name, &mut wanted).map_err(wrong)?;
    let chain = record["chain"].as_array().map(Vec::as_slice).unwrap_or_default();
    let within = |wanted: &Value| chain.iter().any(|earlier| earlier["recipe"] == *wanted);
    match wanted.split_first() {
        Some((outer, inner)) if record["recipe"] == *outer && inner.iter().all(within) => {
            Ok(record["weights_id"].as_str().map(str::to_owned))
        }
        _ => Err(wrong(format!(
            "holds the merge of another recipe (see {RECORD_FILE}), expected this one or nothing; choose another place, or say --overwrite"
        ))),
    }
}

/// The resolved recipe, and behind it those that it leads to, as a record gives them back.
fn resolve(recipe: &Recipe, name: &mut Fetch<'_>, into: &mut Vec<Value>) -> Result<(), String> {
    if into.len() == MAX_RECIPES {
        return Err(format!("the recipe leads to more than {MAX_RECIPES} recipes"));
    }
    let mut named = recipe.clone();
    let places: Vec<PathBuf> = named.places_mut().map(|(path, _)| path.clone()).collect();
    localize(&mut named, name).map_err(|error| error.to_string())?;
    into.push(reread(&reread(&named.to_json())));
    for path in places.iter().filter(|path| !is_remote(path) && is_recipe(path) && !path.is_dir()) {
        resolve(&Recipe::from_file(path).map_err(|error| error.to_string())?, name, into)?;
    }
    Ok(())
}

/// A value as it is after it was written and read: the last bit of a number may be another one then. A recipe becomes a record,
/// and the record a file.
fn reread(value: &Value) -> Value {
    serde_json::from_str(&value.to_string()).unwrap_or(Value::Null)
}
