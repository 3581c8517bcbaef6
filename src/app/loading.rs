//! Settings to what is to be loaded.

use std::path::Path;

use super::{AppError, Loader};
use crate::checkpoint::remote::Remotes;
use crate::clock::Clock;
use crate::config::{CalibrationConfig, Config, EnsembleMode, ModelChoice};
use crate::merge::{CacheOptions, Recipe};
use crate::offline::{Input, Preference, parse_line};
use crate::registry::{Calibration, CalibrationChoice, Ensemble, LoadSpec, MeasuredMembers, Probes, TextOverrides, load_generation};
use crate::text::{BosPolicy, EosPolicy, ReasoningPolicy, TemplateChoice};

fn wrong(place: &str, problem: impl ToString) -> AppError {
    AppError::Config { place: place.to_owned(), problem: problem.to_string() }
}

/// The recipe and everything that is said about it. Reads the recipe's and the template's file.
pub fn load_spec(config: &Config) -> Result<LoadSpec, AppError> {
    let recipe = match &config.model {
        None => return Err(wrong("model", "expected checkpoint folders, a recipe file, or a `model:` section; found none")),
        Some(ModelChoice::RecipeFile(path)) => Recipe::from_file(path),
        Some(ModelChoice::Recipe { yaml, base }) => Recipe::from_yaml(yaml, base),
        Some(ModelChoice::Folders(folders)) => Recipe::uniform(folders),
    };
    let mut recipe = recipe.map_err(|error| wrong("model", error))?;
    if let Some(dtype) = config.dtype {
        recipe = recipe.with_dtype(dtype).ok_or_else(|| wrong("dtype", "no model runs in it"))?;
    }
    recipe = recipe.with_head(config.head.clone(), config.pooling.clone());
    let mut members = MeasuredMembers::default();
    let calibration = match &config.calibration {
        None => CalibrationChoice::None,
        Some(CalibrationConfig::FromConfig) => CalibrationChoice::FromConfig,
        Some(CalibrationConfig::File(path)) => {
            let (merged, measured) = super::calibration::read(path).map_err(|problem| wrong("calibration.file", problem))?;
            members = measured;
            CalibrationChoice::Given(merged)
        }
        Some(CalibrationConfig::Given { mean, std, samples, source }) => {
            let calibration = Calibration::new(*mean, *std, *samples, source.clone());
            CalibrationChoice::Given(calibration.map_err(|error| wrong("calibration", error))?)
        }
    };
    let bos = [BosPolicy::Auto, BosPolicy::Always, BosPolicy::Never, BosPolicy::AsIs];
    let eos = [EosPolicy::AsIs, EosPolicy::Ensure];
    let text = TextOverrides {
        bos: bos.into_iter().find(|policy| policy.name() == config.text.bos).ok_or_else(|| wrong("text.bos", "unknown policy"))?,
        eos: eos.into_iter().find(|policy| policy.name() == config.text.eos).ok_or_else(|| wrong("text.eos", "unknown policy"))?,
        reasoning: if config.text.reasoning == ReasoningPolicy::Strip.name() { ReasoningPolicy::Strip } else { ReasoningPolicy::Keep },
        template: template(config.text.template.as_deref())?,
        template_time: config.text.template_date.map(|date| date.to_datetime(jiff::civil::Time::midnight())),
    };
    Ok(LoadSpec {
        ensemble: match config.ensemble {
            EnsembleMode::Off => Ensemble::Off,
            EnsembleMode::Resident => Ensemble::Resident,
            EnsembleMode::Spread => Ensemble::Spread,
            EnsembleMode::Adapters => Ensemble::Adapters,
            EnsembleMode::Streamed => Ensemble::Streamed,
        },
        text,
        max_tokens: config.max_tokens,
        max_pack_tokens: super::packs::most(config),
        prefix_cache_bytes: config.prefix_cache_bytes,
        device: config.device.clone(),
        batch_invariant: config.batch_invariant,
        calibration,
        remotes: Some(remotes(config)),
        cache: config.cache.as_ref().map(|cache| CacheOptions { dir: cache.dir.clone(), max_bytes: cache.max_bytes as u64 }),
        members,
        ..LoadSpec::new(recipe)
    })
}

/// Hubs and buckets, as the settings and the variables of other tools say.
pub fn remotes(config: &Config) -> Remotes {
    Remotes::from_environment(&config.remotes.0, config.download_max_bytes as u64, Clock::system())
}

/// What a new generation is asked before it goes live: the operator's file, or the bundled probes.
pub(super) fn canary_probes(config: &Config) -> Result<Probes, AppError> {
    let Some(path) = &config.live.canary else { return Ok(Probes::bundled()) };
    let refused = |problem: String| wrong("canary", format!("{}: {problem}", path.display()));
    let (mut samples, mut preferences) = (Vec::new(), Vec::new());
    let text = std::fs::read_to_string(path).map_err(|error| refused(error.to_string()))?;
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let item = parse_line(line).map_err(|error| refused(format!("line {}: {error}", number + 1)))?;
        match item.input {
            Input::One(sample) => samples.push(sample),
            Input::Group(group) => samples.extend(group.samples()),
            Input::Preference(pair) => {
                let Preference { chosen, rejected } = *pair;
                preferences.push((samples.len(), samples.len() + 1));
                samples.extend([chosen, rejected]);
            }
        }
    }
    Probes::new(samples, preferences).map_err(refused)
}

fn template(given: Option<&str>) -> Result<TemplateChoice, AppError> {
    match given {
        None => Ok(TemplateChoice::Default),
        // It is a file where it looks like one.
        Some(path) if path.ends_with(".jinja") || path.contains('/') => {
            let text = std::fs::read_to_string(Path::new(path)).map_err(|error| wrong("text.template", format!("{path}: {error}")))?;
            Ok(TemplateChoice::Source(text))
        }
        Some(name) => Ok(TemplateChoice::Named(name.to_owned())),
    }
}

/// Loads what the settings name, when it is called.
pub fn loader(spec: LoadSpec, clock: Clock) -> Loader {
    Box::new(move |id, progress| load_generation(&spec, id, &clock, progress).map_err(|error| with_causes(&error)))
}

/// An error with what caused it, on one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_words = inner.to_string();
        // Transparent wrappers repeat what they wrap.
        if !words.ends_with(&inner_words) {
            words.push_str(": ");
            words.push_str(&inner_words);
        }
        cause = inner.source();
    }
    words
}
