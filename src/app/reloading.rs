//! Reloads in terms of settings: what the process was started with is read again, and becomes a candidate.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::last_good::{LastGood, StateFolder};
use super::loading::{canary_probes, with_causes};
use super::watching::Watched;
use super::{Loader, load_spec};
use crate::checkpoint::named_base;
use crate::checkpoint::remote::is_remote;
use crate::clock::Clock;
use crate::config::{CalibrationConfig, Config, ConfigErrors, ModelChoice, Resolved, Sources};
use crate::domain::{Fingerprint, GenerationId};
use crate::lock::lock;
use crate::merge::Recipe;
use crate::registry::{
    Activation, CanaryBounds, Candidate, Generation, LoadSpec, Prepared, Probes, Progress, RegistryMetrics, ReloadOutcome, Source,
    first_canary,
};

/// What a process was started with. The file is read again for every reload; the rest cannot change.
#[derive(Clone, Debug, Default)]
pub struct Started {
    pub file: Option<PathBuf>,
    pub environment: Vec<(String, String)>,
    pub flags: Vec<(String, String)>,
    pub folders: Vec<PathBuf>,
}

/// The settings cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("{}: {problem}", .path.display())]
    File { path: PathBuf, problem: std::io::Error },
    #[error(transparent)]
    Config(#[from] ConfigErrors),
}

impl Started {
    /// The settings as they are now.
    pub fn resolve(&self) -> Result<Resolved, SettingsError> {
        let read = |path: &PathBuf| match std::fs::read_to_string(path) {
            Ok(text) => Ok((path.clone(), text)),
            Err(problem) => Err(SettingsError::File { path: path.clone(), problem }),
        };
        let file = self.file.as_ref().map(read).transpose()?;
        let (environment, flags, folders) = (self.environment.clone(), self.flags.clone(), self.folders.clone());
        Ok(Resolved::new(Sources { file, environment, flags, folders })?)
    }
}

/// Settings that a reload takes up, by the beginning of their names. All others need a restart.
const RELOADED: [&str; 11] =
    ["recipe", "cache_", "ensemble", "head", "pooling", "dtype", "batch_invariant", "max_tokens", "text.", "calibration.", "canary"];

fn restart_needed(at_start: &Resolved, now: &Resolved) -> Vec<String> {
    let changes = at_start.changes(now).into_iter();
    let stays = changes.filter(|(key, _, _)| !RELOADED.iter().any(|reloaded| key.starts_with(reloaded)));
    stays.map(|(key, before, after)| format!("{key} stays `{before}`, is `{after}` now")).collect()
}

/// Candidates from the settings of this process. Clones share what they remember.
#[derive(Clone)]
pub struct SettingsSource(Arc<Remembered>);

struct Remembered {
    started: Started,
    at_start: Resolved,
    clock: Clock,
    state: Option<StateFolder>,
    /// What each generation was loaded from, the newest first.
    loaded: Mutex<VecDeque<(Fingerprint, LoadSpec)>>,
    /// The one that went live last.
    live: Mutex<Option<Fingerprint>>,
    /// What was live before the restart is live again, so what is wanted has not been looked at.
    came_back: AtomicBool,
}

/// As many as can be here at once, and more.
const MAX_REMEMBERED: usize = 16;

impl SettingsSource {
    pub fn new(started: Started, at_start: Resolved, clock: Clock) -> Self {
        let state = at_start.config.live.state.clone().map(StateFolder);
        Self(Arc::new(Remembered {
            started,
            at_start,
            clock,
            state,
            loaded: Mutex::default(),
            live: Mutex::default(),
            came_back: AtomicBool::new(false),
        }))
    }

    fn candidate(
        &self,
        spec: &LoadSpec,
        config: &Config,
        restart_needed: Vec<String>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<SettingsCandidate, String> {
        let probes = canary_probes(config).map_err(|error| error.to_string())?;
        let prepared = Prepared::open(spec, &self.0.clock, progress).map_err(|error| with_causes(&error))?;
        Ok(SettingsCandidate { source: self.clone(), prepared, probes, bounds: config.live.bounds, restart_needed })
    }

    /// The first generation: what is wanted now; or what was live last, where that cannot be loaded, or where generations
    /// go live only on call.
    pub fn first(&self, metrics: RegistryMetrics) -> Loader {
        let this = self.clone();
        Box::new(move |id, progress| {
            let config = &this.0.at_start.config;
            let remembered = this.0.state.as_ref().map_or(Ok(None), StateFolder::load);
            let last = remembered.unwrap_or_else(|problem| {
                tracing::error!(problem, "the last good recipe cannot be read");
                None
            });
            let on_call = config.live.activation == Activation::OnCall;
            if let Some(last) = last.as_ref().filter(|_| on_call) {
                match this.load_last(last, config, id, progress) {
                    Ok(generation) => {
                        this.0.came_back.store(true, Ordering::Relaxed);
                        return Ok(generation);
                    }
                    Err(problem) => tracing::error!(problem, "what was live last cannot be loaded, so the wanted recipe goes live"),
                }
            }
            let wanted = this.load_wanted(config, id, progress);
            match (wanted, last.filter(|_| !on_call)) {
                (Err(problem), Some(last)) => {
                    tracing::error!(problem, fingerprint = last.fingerprint, "the wanted recipe cannot be loaded, so the last good one is");
                    let generation = this.load_last(&last, config, id, progress).map_err(|worse| format!("{problem}; and {worse}"))?;
                    metrics.reloaded(ReloadOutcome::Failed);
                    metrics.reloaded(ReloadOutcome::Restored);
                    Ok(generation)
                }
                (wanted, _) => wanted,
            }
        })
    }

    fn load_wanted(&self, config: &Config, id: GenerationId, progress: &mut dyn FnMut(Progress)) -> Result<Generation, String> {
        let spec = load_spec(config).map_err(|error| error.to_string())?;
        let candidate = self.candidate(&spec, config, Vec::new(), progress)?;
        let generation = candidate.load(id, progress)?;
        let figures = first_canary(&generation, &candidate.probes, &candidate.bounds).map_err(|error| with_causes(&error))?;
        tracing::info!(%figures, "canary");
        self.accepted(&generation);
        Ok(generation)
    }

    /// Only under the name it had: a recipe whose files have changed since is not what was good.
    fn load_last(
        &self,
        last: &LastGood,
        config: &Config,
        id: GenerationId,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation, String> {
        let explain = |problem: String| format!("the last good recipe cannot be loaded: {problem}");
        let model = Some(ModelChoice::Recipe { yaml: last.recipe.clone(), base: PathBuf::new() });
        let spec = load_spec(&Config { model, ..config.clone() }).map_err(|error| explain(error.to_string()))?;
        let candidate = self.candidate(&spec, config, Vec::new(), progress).map_err(explain)?;
        let generation = candidate.load(id, progress).map_err(explain)?;
        if generation.fingerprint.to_string() != last.fingerprint {
            let problem = format!(
                "it has fingerprint {}, expected {}: its files or the settings have changed",
                generation.fingerprint, last.fingerprint
            );
            return Err(explain(problem));
        }
        self.accepted(&generation);
        Ok(generation)
    }

    /// Whether the first generation was what was live before the restart, so that what is wanted has to be staged again.
    pub(super) fn came_back(&self) -> bool {
        self.0.came_back.load(Ordering::Relaxed)
    }

    /// The files that a reload would read, as far as they can be told now.
    pub(super) fn watched(&self) -> Watched {
        let mut watched = Watched { files: self.0.started.file.iter().cloned().collect(), folders: Vec::new() };
        let resolved = self.0.started.resolve();
        let config = resolved.as_ref().map_or(&self.0.at_start.config, |resolved| &resolved.config);
        if let Some(ModelChoice::RecipeFile(path)) = &config.model {
            watched.files.push(path.clone());
        }
        watched.files.extend(config.live.canary.clone());
        if let Some(CalibrationConfig::File(path)) = &config.calibration {
            watched.files.push(path.clone());
        }
        watched.files.extend(config.text.template.as_ref().map(PathBuf::from).filter(|path| path.is_file()));
        // Of a recipe that cannot be read its own file is watched, and that of the live one has its folders still.
        let wanted = load_spec(config).ok().map(|spec| spec.recipe);
        let live = self.spec_of_live().map(|spec| spec.recipe);
        wanted.into_iter().chain(live).for_each(|recipe| add_places(&mut watched, recipe, 0));
        for places in [&mut watched.files, &mut watched.folders] {
            places.sort();
            places.dedup();
        }
        watched
    }

    fn spec_of_live(&self) -> Option<LoadSpec> {
        let live = (*lock(&self.0.live))?;
        lock(&self.0.loaded).iter().find(|(fingerprint, _)| *fingerprint == live).map(|(_, spec)| spec.clone())
    }
}

/// What a recipe names that should lie here and does not: recipes' files, and folders that hold no checkpoint.
pub fn missing(recipe: Recipe) -> Vec<PathBuf> {
    let mut named = Watched::default();
    add_places(&mut named, recipe, 0);
    let Watched { mut files, folders } = named;
    files.retain(|path| !path.is_file());
    files.extend(folders.into_iter().filter(|path| !["config.json", "adapter_config.json"].iter().any(|file| path.join(file).is_file())));
    files.sort();
    files.dedup();
    files
}

/// Recipes within recipes whose files are watched.
const MAX_DEPTH: usize = 8;

/// Everything that a recipe names and that lies here: checkpoint folders, the bases of adapters, and recipes with what they
/// name. What lies on a hub does not change under its name.
fn add_places(watched: &mut Watched, mut recipe: Recipe, depth: usize) {
    let places: Vec<PathBuf> = recipe.places_mut().map(|(path, _)| path.clone()).filter(|path| !is_remote(path)).collect();
    for path in places {
        match Recipe::from_file(&path) {
            Ok(inner) if path.is_file() && depth < MAX_DEPTH => add_places(watched, inner, depth + 1),
            _ if !path.is_file() => {
                watched.folders.extend(named_base(&path));
                watched.folders.push(path);
                continue;
            }
            _ => {}
        }
        watched.files.push(path);
    }
}

impl Source for SettingsSource {
    fn prepare(&self, progress: &mut dyn FnMut(Progress)) -> Result<Box<dyn Candidate>, String> {
        let now = self.0.started.resolve().map_err(|error| error.to_string())?;
        let spec = load_spec(&now.config).map_err(|error| error.to_string())?;
        // What a pack holds, and how many devices there are, is settled when the devices' workers start.
        let at_start = &self.0.at_start.config;
        let (device, prefix_cache_bytes) = (at_start.device.clone(), at_start.prefix_cache_bytes);
        let spec = LoadSpec { max_pack_tokens: super::packs::most(at_start), device, prefix_cache_bytes, ..spec };
        Ok(Box::new(self.candidate(&spec, &now.config, restart_needed(&self.0.at_start, &now), progress)?))
    }

    fn last_good(&self, progress: &mut dyn FnMut(Progress)) -> Result<Box<dyn Candidate>, String> {
        let spec = self.spec_of_live().ok_or_else(|| "none is known".to_owned())?;
        Ok(Box::new(self.candidate(&spec, &self.0.at_start.config, Vec::new(), progress)?))
    }

    fn accepted(&self, generation: &Generation) {
        *lock(&self.0.live) = Some(generation.fingerprint);
        let Some(state) = &self.0.state else { return };
        let last = LastGood { fingerprint: generation.fingerprint.to_string(), recipe: generation.info.recipe.clone() };
        if let Err(error) = state.save(&last) {
            tracing::error!(%error, folder = %state.0.display(), "the last good recipe cannot be remembered for a restart");
        }
    }
}

struct SettingsCandidate {
    source: SettingsSource,
    prepared: Prepared,
    probes: Probes,
    bounds: CanaryBounds,
    restart_needed: Vec<String>,
}

impl Candidate for SettingsCandidate {
    fn summary(&self) -> String {
        self.prepared.plan().to_string()
    }

    fn restart_needed(&self) -> &[String] {
        &self.restart_needed
    }

    fn fingerprint(&self, progress: &mut dyn FnMut(Progress)) -> Result<Fingerprint, String> {
        self.prepared.fingerprint(progress).map_err(|error| with_causes(&error))
    }

    fn equipment(&self) -> Result<String, String> {
        self.prepared.equipment().map_err(|error| with_causes(&error))
    }

    fn device_bytes(&self) -> u64 {
        self.prepared.device_bytes()
    }

    fn prefix_bytes(&self) -> u64 {
        self.prepared.prefix_bytes()
    }

    fn canary(&self) -> (&Probes, &CanaryBounds) {
        (&self.probes, &self.bounds)
    }

    fn load(&self, id: GenerationId, progress: &mut dyn FnMut(Progress)) -> Result<Generation, String> {
        let generation = self.prepared.load(id, progress).map_err(|error| with_causes(&error))?;
        let mut loaded = lock(&self.source.0.loaded);
        loaded.retain(|(fingerprint, _)| *fingerprint != generation.fingerprint);
        loaded.push_front((generation.fingerprint, self.prepared.spec().clone()));
        loaded.truncate(MAX_REMEMBERED);
        Ok(generation)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::watching::look;
    use super::*;
    use crate::config::SETTINGS;

    fn resolved(file: &str) -> Resolved {
        Resolved::new(Sources { file: Some((PathBuf::from("warm.yaml"), file.to_owned())), ..Sources::default() }).expect("valid")
    }

    #[test]
    fn what_a_reload_takes_up_is_silent_and_the_rest_needs_a_restart() {
        let before = resolved("listen: 127.0.0.1:1\nmax_tokens: 5\n");
        let after = resolved("listen: 127.0.0.1:2\nmax_tokens: 6\nmax_pack_tokens: 9\ntext: {bos: never}\ncanary: x.jsonl\n");
        assert_eq!(
            restart_needed(&before, &after),
            ["listen stays `127.0.0.1:1`, is `127.0.0.1:2` now", "max_pack_tokens stays `8192`, is `9` now"]
        );
        assert!(restart_needed(&after, &after).is_empty());
    }

    #[test]
    fn settings_that_are_taken_up_are_settings() {
        for reloaded in RELOADED {
            assert!(SETTINGS.iter().any(|setting| setting.key.starts_with(reloaded)), "{reloaded}");
        }
    }

    /// A server of a nested recipe: an average within an average, an adapter whose own file names its base, a calibration
    /// and probes.
    fn nested(dir: &Path) -> SettingsSource {
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, text).expect("written");
        };
        for folder in ["one", "two", "base"] {
            write(&format!("{folder}/config.json"), "{}");
            write(&format!("{folder}/tokenizer.json"), "{}");
        }
        write("adapter/adapter_config.json", "{\"base_model_name_or_path\": \"../base\"}");
        write("inner.yaml", "members: [./two, ./adapter]");
        write("outer.yaml", "members: [./one, ./inner.yaml]");
        write("probes.jsonl", "{\"text\": \"x\"}");
        write("calibration.json", "{\"mean\": 0, \"std\": 1}");
        write("warm.yaml", "recipe: outer.yaml\ncanary: probes.jsonl\ncalibration: {file: calibration.json}\n");
        let started = Started { file: Some(dir.join("warm.yaml")), ..Started::default() };
        let resolved = started.resolve().expect("valid settings");
        SettingsSource::new(started, resolved, Clock::system())
    }

    #[test]
    fn a_change_in_whatever_a_reload_would_read_is_a_reason_to_reload() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let source = nested(dir.path());
        let now = || look(&source.watched(), None).0;
        assert_eq!(now(), now(), "nothing has changed");
        for file in [
            "warm.yaml",
            "outer.yaml",
            "inner.yaml",
            "one/config.json",
            "one/tokenizer.json",
            "two/tokenizer.json",
            "two/model.safetensors",
            "adapter/adapter_config.json",
            "base/config.json",
            "base/tokenizer.json",
            "probes.jsonl",
            "calibration.json",
        ] {
            let (path, before) = (dir.path().join(file), now());
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            std::fs::write(&path, format!("{text}\n")).expect("written");
            assert_ne!(now(), before, "{file}");
        }
    }
}
