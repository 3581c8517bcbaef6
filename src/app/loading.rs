//! Settings to what is to be loaded.

use std::path::Path;

use super::{AppError, Loader};
use crate::checkpoint::remote::Remotes;
use crate::clock::Clock;
use crate::config::{CalibrationConfig, Config, EnsembleMode, ModelChoice};
use crate::merge::{CacheOptions, Recipe};
use crate::registry::{Calibration, CalibrationChoice, Ensemble, LoadSpec, TextOverrides, load_generation};
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
    let calibration = match &config.calibration {
        None => CalibrationChoice::None,
        Some(CalibrationConfig::FromConfig) => CalibrationChoice::FromConfig,
        Some(CalibrationConfig::File(path)) => CalibrationChoice::Given(calibration_file(path)?),
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
        },
        text,
        max_tokens: config.max_tokens,
        max_pack_tokens: config.max_pack_tokens,
        device: config.device.clone(),
        calibration,
        remotes: Some(Remotes::from_environment(&config.remotes.0, config.download_max_bytes as u64, Clock::system())),
        cache: config.cache.as_ref().map(|cache| CacheOptions { dir: cache.dir.clone(), max_bytes: cache.max_bytes as u64 }),
        ..LoadSpec::new(recipe)
    })
}

/// `{"mean", "std"}`, with what they were measured on.
fn calibration_file(path: &Path) -> Result<Calibration, AppError> {
    let refused = |problem: String| wrong("calibration.file", format!("{}: {problem}", path.display()));
    let text = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let fields: serde_json::Value = serde_json::from_slice(&text).map_err(|error| refused(error.to_string()))?;
    let number = |name: &str| {
        let value = fields.get(name).and_then(serde_json::Value::as_f64);
        value.ok_or_else(|| refused(format!("expected a number `{name}`")))
    };
    let samples = fields.get("samples").and_then(serde_json::Value::as_u64).unwrap_or(0);
    let source = fields.get("source").and_then(serde_json::Value::as_str).map_or_else(|| path.display().to_string(), str::to_owned);
    Calibration::new(number("mean")?, number("std")?, samples, source).map_err(|error| refused(error.to_string()))
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
