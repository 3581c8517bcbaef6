//! Settings: defaults < file < environment < flags. Unknown keys are mistakes, all mistakes are reported at once, and
//! every value remembers where it comes from. Pure: files and variables are handed in.

mod layers;
mod live;
mod parse;
mod remotes;
mod settings;
mod values;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use layers::{ConfigError, Given, Origin};
pub use live::{LiveConfig, WatchConfig};
pub use parse::{duration as parse_duration, size as parse_size, size_or_off as parse_size_or_off};
pub use remotes::RemoteVariables;
pub use settings::{FILE_VARIABLE, SETTINGS, Setting};
pub use values::{AdmissionConfig, CacheConfig, CalibrationConfig, EnsembleMode, MessageConfig, ModelChoice, TextConfig};

use crate::checkpoint::remote::Remotes;
use crate::checkpoint::{Dtype, HeadChoice};
use crate::merge::Recipe;
use crate::model::DeviceChoice;
use crate::telemetry::LogFormat;
use layers::Layer;

/// All settings, checked one by one. What depends on the model is checked when it is loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Absent: nothing names a model.
    pub model: Option<ModelChoice>,
    pub listen: SocketAddr,
    pub admin_listen: SocketAddr,
    /// Absent: nothing is kept.
    pub cache: Option<CacheConfig>,
    pub ensemble: EnsembleMode,
    /// Absent: as the recipe says.
    pub head: Option<HeadChoice>,
    /// Absent: as the recipe says.
    pub pooling: Option<HeadChoice>,
    /// Absent: as the recipe says.
    pub dtype: Option<Dtype>,
    pub device: DeviceChoice,
    pub batch_invariant: bool,
    /// Absent: one per core.
    pub threads: Option<usize>,
    pub nice: u8,
    /// Absent: as the model says.
    pub max_tokens: Option<usize>,
    /// Absent: as many as there is room for, and as are of use.
    pub max_pack_tokens: Option<usize>,
    pub prefix_cache_bytes: usize,
    pub admission: AdmissionConfig,
    pub message: MessageConfig,
    /// Requests of one stream that are scored at once.
    pub stream_window: usize,
    /// Absent: never.
    pub keepalive_interval: Option<Duration>,
    pub keepalive_timeout: Duration,
    /// Absent: any age.
    pub max_connection_age: Option<Duration>,
    pub drain_delay: Duration,
    pub drain_deadline: Duration,
    pub text: TextConfig,
    pub calibration: Option<CalibrationConfig>,
    pub live: LiveConfig,
    pub log_format: LogFormat,
    pub log_filter: String,
    /// From 0 to 1.
    pub log_successes: f64,
    pub log_content: bool,
    /// Variables of other tools that say where models are downloaded from, and kept.
    pub remotes: RemoteVariables,
    /// Of one checkpoint.
    pub download_max_bytes: usize,
    /// Absent: no traces.
    pub traces_endpoint: Option<String>,
    /// From 0 to 1.
    pub traces_share: f64,
    /// Empty: the first that call.
    pub tenants: Vec<String>,
}

/// What a configuration is made from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The file's path and text.
    pub file: Option<(PathBuf, String)>,
    /// The process environment.
    pub environment: Vec<(String, String)>,
    /// Keys and values.
    pub flags: Vec<(String, String)>,
    /// Checkpoint folders named on the command line.
    pub folders: Vec<PathBuf>,
}

/// A checked configuration and where each of its values comes from.
#[derive(Clone, Debug)]
pub struct Resolved {
    pub config: Config,
    values: BTreeMap<&'static str, Given>,
}

/// All mistakes of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "{count} mistake{} in the configuration", if count == 1 { "" } else { "s" })?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl Resolved {
    /// Puts the sources together, the nearer winning.
    pub fn new(sources: Sources) -> Result<Self, ConfigErrors> {
        let mut errors = Vec::new();
        let file = sources.file.as_ref().map(|(path, text)| layers::file(path, text, &mut errors)).unwrap_or_default();
        let environment = layers::environment(&sources.environment, &mut errors);
        let flags = layers::flags(&sources.flags, &mut errors);
        let base = sources.file.as_ref().and_then(|(path, _)| path.parent()).unwrap_or(Path::new("")).to_owned();
        if let (Some(_), Some(named), Some((path, _))) = (&file.recipe, file.layer.0.get("recipe"), &sources.file) {
            let problem = format!("stands beside `recipe: {}`; expected one of them", named.text);
            errors.push(ConfigError { place: format!("{}: model", path.display()), problem });
        }
        let values = Layer::defaults().under(file.layer).under(environment).under(flags);
        if let (Some(recipe), Some((path, _))) = (&file.recipe, &sources.file)
            && let Err(wrong) = Recipe::from_yaml(recipe, &base)
        {
            let place = format!("{}: model", path.display());
            errors.extend(wrong.problems.into_iter().map(|problem| ConfigError { place: place.clone(), problem }));
        }
        let mut reader = Reader { values: &values.0, errors: &mut errors };
        let model = reader.model(&sources.folders, file.recipe, &base);
        let mut config = reader.config(model, &base);
        let told = sources.environment.iter().filter(|(name, _)| Remotes::is_variable(name));
        config.remotes = RemoteVariables(told.cloned().collect());
        if errors.is_empty() { Ok(Self { config, values: values.0 }) } else { Err(ConfigErrors(errors)) }
    }

    /// The settings that have another value in `other`, in the order of the table: key, value here, value there.
    pub fn changes<'a>(&'a self, other: &'a Self) -> Vec<(&'static str, &'a str, &'a str)> {
        let text = |resolved: &'a Self, key| resolved.values.get(key).map_or("", |given| given.text.as_str());
        let both = SETTINGS.iter().map(|setting| (setting.key, text(self, setting.key), text(other, setting.key)));
        both.filter(|(_, here, there)| here != there).collect()
    }

    /// `key = value  (origin)`, one line each, in the order of the table: what `warm check-config` prints.
    pub fn describe(&self) -> String {
        let lines: Vec<(String, &Given)> = SETTINGS
            .iter()
            .filter_map(|setting| self.values.get(setting.key).map(|given| (format!("{} = {}", setting.key, given.text), given)))
            .collect();
        let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0).min(60);
        let mut text = String::new();
        for (line, given) in lines {
            text.push_str(&format!("{line:width$}  ({})\n", given.origin));
        }
        let model = match &self.config.model {
            None => "none named".to_owned(),
            Some(ModelChoice::RecipeFile(path)) => format!("recipe file {}", path.display()),
            Some(ModelChoice::Recipe { base, .. }) => format!("the recipe under `model:`, relative to {}", display_dir(base)),
            Some(ModelChoice::Folders(folders)) => {
                let folders: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
                format!("the uniform average of {}", folders.join(", "))
            }
        };
        text.push_str(&format!("model: {model}\n"));
        text
    }
}

fn display_dir(path: &Path) -> String {
    if path.as_os_str().is_empty() { ".".to_owned() } else { path.display().to_string() }
}

/// Reads typed values out of the folded layers and keeps what does not work.
struct Reader<'a> {
    values: &'a BTreeMap<&'static str, Given>,
    errors: &'a mut Vec<ConfigError>,
}

impl Reader<'_> {
    fn get<T>(&mut self, key: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> T {
        let default = settings::find(key).map_or("", |setting| setting.default);
        let given = self.values.get(key);
        let text = given.map_or(default, |given| given.text.as_str());
        parse(text).unwrap_or_else(|problem| {
            let origin = given.map_or(Origin::Default, |given| given.origin.clone());
            let mut found = text.to_owned();
            if found.len() > 80 {
                found = found.chars().take(80).chain(['…']).collect();
            }
            self.errors.push(ConfigError { place: format!("{key} ({origin})"), problem: format!("{problem}, found `{found}`") });
            match parse(default) {
                Ok(value) => value,
                Err(problem) => unreachable!("the default of {key} is a constant that tests parse: {problem}"),
            }
        })
    }

    fn model(&mut self, folders: &[PathBuf], recipe: Option<String>, base: &Path) -> Option<ModelChoice> {
        let named = self.values.get("recipe").filter(|given| !given.text.is_empty());
        if !folders.is_empty() {
            if let Some(Given { origin: Origin::Flag(flag), .. }) = named {
                let problem = "stands beside checkpoint folders; expected one of them".to_owned();
                self.errors.push(ConfigError { place: format!("--{flag}"), problem });
            }
            return Some(ModelChoice::Folders(folders.to_vec()));
        }
        match (named, recipe) {
            // A path in a file is relative to that file; a path in a flag or variable to where the command runs.
            (Some(Given { text, origin: Origin::File(_) }), _) => Some(ModelChoice::RecipeFile(base.join(text))),
            (Some(Given { text, .. }), _) => Some(ModelChoice::RecipeFile(PathBuf::from(text))),
            (None, Some(yaml)) => Some(ModelChoice::Recipe { yaml, base: base.to_owned() }),
            (None, None) => None,
        }
    }

    fn calibration(&mut self, base: &Path) -> Option<CalibrationConfig> {
        let from_file = matches!(self.values.get("calibration.file"), Some(Given { origin: Origin::File(_), .. }));
        let file = self.get("calibration.file", parse::optional_text);
        let from_config = self.get("calibration.from_config", parse::choice(&[("false", false), ("off", false), ("true", true)]));
        let given = self.given_calibration();
        if usize::from(file.is_some()) + usize::from(from_config) + usize::from(given.is_some()) > 1 {
            let problem = "expected one of calibration.mean and std, calibration.file, calibration.from_config; found more".to_owned();
            self.errors.push(ConfigError { place: "calibration".to_owned(), problem });
        }
        match file {
            // A path in a file is relative to that file.
            Some(path) => Some(CalibrationConfig::File(if from_file { base.join(path) } else { PathBuf::from(path) })),
            None if from_config => Some(CalibrationConfig::FromConfig),
            None => given,
        }
    }

    fn given_calibration(&mut self) -> Option<CalibrationConfig> {
        let mean = self.get("calibration.mean", parse::optional_float);
        let std = self.get("calibration.std", parse::optional_float);
        let samples = self.get("calibration.samples", parse::number_from_zero);
        let source = self.get("calibration.source", parse::text);
        let mut refuse = |place: &str, problem: &str| {
            self.errors.push(ConfigError { place: place.to_owned(), problem: problem.to_owned() });
        };
        match (mean, std) {
            (None, None) => None,
            (Some(mean), Some(std)) => {
                if std <= 0.0 {
                    refuse("calibration.std", "expected a number above 0");
                }
                Some(CalibrationConfig::Given { mean, std, samples, source })
            }
            (Some(_), None) => {
                refuse("calibration.std", "expected a number beside calibration.mean, found none");
                None
            }
            (None, Some(_)) => {
                refuse("calibration.mean", "expected a number beside calibration.std, found none");
                None
            }
        }
    }

    fn text(&mut self, base: &Path) -> TextConfig {
        let from_file = matches!(self.values.get("text.template"), Some(Given { origin: Origin::File(_), .. }));
        let template = self.get("text.template", parse::optional_text);
        // A template is a file where it looks like one; such a path in a file is relative to that file.
        let relative = |name: String| {
            let is_file = name.ends_with(".jinja") || name.contains('/');
            if from_file && is_file { base.join(name).display().to_string() } else { name }
        };
        let policies = |names: &'static [(&'static str, &'static str)]| parse::choice(names);
        TextConfig {
            bos: self
                .get("text.bos", policies(&[("auto", "auto"), ("always", "always"), ("never", "never"), ("as_is", "as_is")]))
                .to_owned(),
            eos: self.get("text.eos", policies(&[("as_is", "as_is"), ("ensure", "ensure")])).to_owned(),
            reasoning: self.get("text.reasoning", policies(&[("keep", "keep"), ("strip", "strip")])).to_owned(),
            template: template.map(relative),
            template_date: self.get("text.template_date", parse::optional_date),
        }
    }

    fn cache(&mut self, base: &Path) -> Option<CacheConfig> {
        let max_bytes = self.get("cache_max_bytes", parse::size);
        let from_file = matches!(self.values.get("cache_dir"), Some(Given { origin: Origin::File(_), .. }));
        let dir = self.get("cache_dir", parse::optional_text)?;
        // As for a recipe: a path in a file is relative to that file.
        let dir = if from_file { base.join(dir) } else { PathBuf::from(dir) };
        Some(CacheConfig { dir, max_bytes })
    }

    fn config(&mut self, model: Option<ModelChoice>, base: &Path) -> Config {
        Config {
            model,
            listen: self.get("listen", parse::address),
            admin_listen: self.get("admin.listen", parse::address),
            cache: self.cache(base),
            ensemble: self.get(
                "ensemble",
                parse::choice(&[
                    ("off", EnsembleMode::Off),
                    ("resident", EnsembleMode::Resident),
                    ("spread", EnsembleMode::Spread),
                    ("adapters", EnsembleMode::Adapters),
                    ("streamed", EnsembleMode::Streamed),
                ]),
            ),
            head: self.get("head", parse::head),
            pooling: self.get("pooling", parse::pooling),
            dtype: self.get("dtype", parse::dtype),
            device: self.get("device", str::parse),
            batch_invariant: self.get("batch_invariant", parse::switch),
            threads: self.get("threads", parse::auto_count),
            nice: self.get("nice", parse::nice),
            max_tokens: self.get("max_tokens", parse::auto_count),
            max_pack_tokens: self.get("max_pack_tokens", parse::auto_count),
            prefix_cache_bytes: self.get("prefix_cache_bytes", parse::size_or_off),
            admission: AdmissionConfig {
                max_requests: self.get("admission.max_requests", parse::count),
                max_bytes: self.get("admission.max_bytes", parse::size),
                max_tokens: self.get("admission.max_tokens", parse::count),
                max_queue: self.get("admission.max_queue", parse::count),
                retry_after: self.get("admission.retry_after", parse::duration),
            },
            message: MessageConfig {
                max_decode: self.get("message.max_decode", parse::size),
                max_encode: self.get("message.max_encode", parse::size),
                max_samples: self.get("message.max_samples", parse::count),
                max_expanded: self.get("message.max_expanded", parse::size),
            },
            stream_window: self.get("stream.window", parse::count),
            keepalive_interval: Some(self.get("http2.keepalive_interval", parse::duration)).filter(|interval| !interval.is_zero()),
            keepalive_timeout: self.get("http2.keepalive_timeout", parse::duration),
            max_connection_age: Some(self.get("http2.max_connection_age", parse::duration)).filter(|age| !age.is_zero()),
            drain_delay: self.get("drain.delay", parse::duration),
            drain_deadline: self.get("drain.deadline", parse::duration),
            text: self.text(base),
            calibration: self.calibration(base),
            live: self.live(base),
            log_format: self.get("log.format", parse::choice(&[("text", LogFormat::Text), ("json", LogFormat::Json)])),
            log_filter: self.get("log.filter", parse::text),
            log_successes: self.get("log.successes", parse::share),
            log_content: self.get("log.content", parse::switch),
            remotes: RemoteVariables::default(),
            download_max_bytes: self.get("download.max_bytes", parse::size),
            traces_endpoint: self.get("traces.endpoint", parse::optional_url),
            traces_share: self.get("traces.share", parse::share),
            tenants: self.get("tenants", parse::tenants),
        }
    }
}

#[cfg(test)]
mod tests;
