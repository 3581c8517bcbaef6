//! Opening what a recipe names: checkpoint folders, and other recipes, whose merges are made while they are read.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::places::{Fetch, localize};
use super::plan::{Input, MergePlan};
use super::recipe::{Recipe, is_recipe};
use super::{MergeError, Merged};
use crate::checkpoint::{Architecture, CheckpointError, Elements, Folder, Manifest, SourceError, TensorSource};

/// Recipes within recipes; WARP's iterations are five in the paper.
const MAX_DEPTH: usize = 32;
/// Checkpoints and recipes that one recipe leads to, all in all.
const MAX_SOURCES: usize = 1024;

/// The merge of another recipe. Its coefficients may depend on weights, so it can be read only once it is prepared.
pub struct Nested {
    plan: Arc<MergePlan>,
    merged: OnceLock<Merged>,
}

impl Nested {
    pub fn plan(&self) -> &Arc<MergePlan> {
        &self.plan
    }

    /// The merge, once it is prepared.
    pub fn merged(&self) -> Option<&Merged> {
        self.merged.get()
    }

    /// Reads what its coefficients depend on, once. No lock is held meanwhile: whoever waits for one inside of a thread
    /// pool may be handed work that needs it.
    pub fn prepare(&self) -> Result<(), SourceError> {
        if self.merged.get().is_none() {
            let merged = Merged::new(Arc::clone(&self.plan))?;
            // Another thread may have been faster, with the same outcome.
            let _ = self.merged.set(merged);
        }
        Ok(())
    }
}

impl TensorSource for Nested {
    fn manifest(&self) -> &Manifest {
        self.plan.manifest()
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        let missing = || SourceError::NoSuchTensor { tensor: name.to_owned(), problem: "its merge is not prepared".to_owned() };
        self.merged.get().ok_or_else(missing)?.read(name, range, into)
    }
}

impl fmt::Debug for Nested {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nested({:?})", self.plan)
    }
}

/// The way from the outermost recipe to the one that is being opened.
pub struct Opening<'f> {
    trail: Vec<PathBuf>,
    sources: usize,
    fetch: &'f mut Fetch<'f>,
}

impl<'f> Opening<'f> {
    pub fn new(fetch: &'f mut Fetch<'f>) -> Self {
        Self { trail: Vec::new(), sources: 0, fetch }
    }

    /// Fetches what the recipe names that lies elsewhere, all of it before anything is opened, and plans.
    pub fn plan(&mut self, recipe: &Recipe) -> Result<MergePlan, MergeError> {
        let mut recipe = recipe.clone();
        localize(&mut recipe, self.fetch).map_err(|error| MergeError { problems: vec![error.to_string()] })?;
        let init = recipe.init().map(|path| self.open(path, None));
        MergePlan::new(&recipe, recipe.members().iter().map(|member| self.open(&member.path, member.base.as_deref())), init)
    }

    fn open(&mut self, path: &Path, base: Option<&Path>) -> Result<Input, CheckpointError> {
        let wrong = |problem: String| CheckpointError::new(path.display(), problem);
        self.sources += 1;
        if self.sources > MAX_SOURCES {
            return Err(wrong(format!("the recipe leads to more than {MAX_SOURCES} checkpoints and recipes")));
        }
        if path.is_dir() || !is_recipe(path) {
            return Folder::open(path, base).map(Input::from);
        }
        if let Some(base) = base {
            return Err(wrong(format!("is no LoRA adapter, so it stands on no base; found base {:?}", base.display().to_string())));
        }
        let place = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if self.trail.contains(&place) {
            let way: Vec<_> = self.trail.iter().chain([&place]).map(|path| path.display().to_string()).collect();
            return Err(wrong(format!("the recipe leads back to itself: {}", way.join(" -> "))));
        }
        if self.trail.len() == MAX_DEPTH {
            return Err(wrong(format!("recipes lead to recipes more than {MAX_DEPTH} times")));
        }
        let recipe = Recipe::from_file(path).map_err(|error| wrong(error.problems.join("; ")))?;
        self.trail.push(place);
        let plan = self.plan(&recipe);
        self.trail.pop();
        let plan = plan.map_err(|error| wrong(error.problems.join("; ")))?;
        Ok(Input::from(Arc::new(plan)))
    }
}

impl From<Folder> for Input {
    fn from(folder: Folder) -> Self {
        let Folder { config, weights, architecture, text, notes, lost_head } = folder;
        Self { weights, config, architecture, text, notes, lost_head, nested: None }
    }
}

impl From<Arc<MergePlan>> for Input {
    fn from(plan: Arc<MergePlan>) -> Self {
        let (config, text) = (plan.config().clone(), plan.text().cloned().map_err(Clone::clone));
        let architecture = Architecture::parse(&config).map_err(|problems| CheckpointError::new("the merged model", problems.join("; ")));
        let nested = Arc::new(Nested { plan, merged: OnceLock::new() });
        let weights = Arc::clone(&nested) as Arc<dyn TensorSource>;
        Self { weights, config, architecture, text, notes: Vec::new(), lost_head: None, nested: Some(nested) }
    }
}
