//! `warm plan`: what a recipe would do, or everything that forbids it. No weights are read.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::arguments::RecipeArgs;
use super::{CommandError, Environment};
use crate::app::memory_limit;
use crate::checkpoint::remote::Remotes;
use crate::clock::Clock;
use crate::config::{SETTINGS, parse_size, parse_size_or_off};
use crate::domain::GenerationId;
use crate::merge::{MergeError, MergePlan, Recipe};
use crate::model::{Arithmetic, DeviceChoice, Place, card};
use crate::offline::{DevicePlan, DeviceRequest, PlanSummary, Rate, StepPlan, Workload, measure};
use crate::registry::{Ensemble, LoadSpec, Swap, load_generation, members_on_one_base};

/// The recipe is wrong, its members cannot be merged, or what they make does not fit.
const EXIT_REFUSED: u8 = 2;

#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The largest file of weights that a merge would write; a larger tensor gets a file of its own.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    max_shard_size: usize,
    /// What `prefix_cache_bytes` of the server is to be: a size, or off.
    #[arg(long, value_name = "SIZE", default_value = default_of("prefix_cache_bytes"), value_parser = parse_size_or_off)]
    prefix_cache_bytes: usize,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    step: StepArgs,
    /// The plan, or what forbids it, as JSON.
    #[arg(long)]
    json: bool,
}

/// What serving takes of a device.
#[derive(Debug, Args)]
#[command(next_help_heading = "Memory of a device")]
struct DeviceArgs {
    /// Check the memory that serving takes against this device: cpu, or cuda:0.
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// What the device has, where it is not this machine's.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    device_memory: Option<usize>,
    /// Tokens of a forward pass; auto: as many as there is room for, and as are of use.
    #[arg(long, value_name = "N", default_value = "auto", value_parser = auto_count)]
    max_pack_tokens: Auto,
    /// Members beside the merged model.
    #[arg(long, value_name = "MODE", default_value = "off")]
    ensemble: Members,
    /// How a reload takes over.
    #[arg(long, value_name = "WAY", default_value = "beside")]
    swap: Takeover,
    /// Equal bits in any company on a card, too.
    #[arg(long)]
    batch_invariant: bool,
}

fn default_of(key: &str) -> &'static str {
    SETTINGS.iter().find(|setting| setting.key == key).map_or("", |setting| setting.default)
}

/// What a trainer's step takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "A trainer's step")]
struct StepArgs {
    /// What is scored at once, such as prompts=512,group=16,prompt=1000,completion=2000: completions of a prompt, and tokens.
    #[arg(long, value_name = "FIELDS")]
    workload: Option<Workload>,
    /// How long that may take.
    #[arg(long, value_name = "SECONDS", requires = "workload", value_parser = above_zero)]
    step_seconds: Option<f64>,
    /// Distinct tokens that one card scores in a second.
    #[arg(long, value_name = "R", requires = "workload", value_parser = above_zero, group = "rate")]
    tokens_per_second: Option<f64>,
    /// The rate that `warm bench --json` has measured and written to this file.
    #[arg(long, value_name = "FILE", requires = "workload", group = "rate")]
    rate_from: Option<PathBuf>,
    /// Load the model here, and measure the rate.
    #[arg(long, requires = "workload", group = "rate")]
    measure: bool,
}

/// A number, or as it comes.
#[derive(Clone, Copy, Debug)]
struct Auto(Option<usize>);

fn auto_count(text: &str) -> Result<Auto, String> {
    let count = text.parse().ok().filter(|count| (1..=1 << 24).contains(count));
    match (text, count) {
        ("auto", _) => Ok(Auto(None)),
        (_, Some(count)) => Ok(Auto(Some(count))),
        _ => Err("expected a whole number from 1 to 16777216, or auto".to_owned()),
    }
}

fn above_zero(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0).ok_or_else(|| "expected a number above 0".to_owned())
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Members {
    Off,
    Resident,
    Spread,
    Adapters,
    Streamed,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Takeover {
    Beside,
    #[value(name = "in_place", alias = "in-place")]
    InPlace,
}

pub(super) fn run(arguments: &PlanArgs, environment: &Environment) -> Result<ExitCode, CommandError> {
    let remotes = arguments.recipe.remotes(environment)?;
    let (planned, mut problems) = match arguments.recipe.plan(&remotes) {
        Ok(plan) => (Some(plan), Vec::new()),
        Err(CommandError::Plan(error)) => (None, error.problems),
        Err(CommandError::Recipe(error)) => {
            let place = error.file.map(|file| format!("recipe {file}: ")).unwrap_or_default();
            (None, error.problems.into_iter().map(|problem| format!("{place}{problem}")).collect())
        }
        Err(other) => return Err(other),
    };
    let Some(plan) = planned else {
        if arguments.json {
            println!("{:#}", json!({"ok": false, "problems": problems}));
        } else {
            eprintln!("error: {}", MergeError { problems });
        }
        return Ok(ExitCode::from(EXIT_REFUSED));
    };
    let (shard, prefixes) = (arguments.max_shard_size as u64, arguments.prefix_cache_bytes as u64);
    let summary = PlanSummary::new(&plan, rayon::current_num_threads(), shard, prefixes);
    let device = arguments.device.plan(&plan, prefixes, &mut problems)?;
    let step = arguments.step.plan(&plan, &arguments.device, remotes)?;
    problems.extend(device.iter().flat_map(|device| &device.problems).cloned());
    problems.extend(step.iter().flat_map(|step| &step.problems).cloned());
    if arguments.json {
        let mut whole = json!({"ok": problems.is_empty()});
        let to_json = |part: Result<Value, serde_json::Error>| part.map_err(|error| CommandError::Other(error.to_string()));
        if let (Value::Object(whole), Value::Object(summary)) = (&mut whole, to_json(serde_json::to_value(&summary))?) {
            whole.extend(summary);
            whole.extend(
                device.map(|device| Ok::<_, CommandError>(("device".to_owned(), to_json(serde_json::to_value(device))?))).transpose()?,
            );
            whole.extend(step.map(|step| Ok::<_, CommandError>(("step".to_owned(), to_json(serde_json::to_value(step))?))).transpose()?);
            if !problems.is_empty() {
                whole.insert("problems".to_owned(), json!(problems));
            }
        }
        println!("{whole:#}");
    } else {
        println!("{summary}");
        device.iter().for_each(|device| println!("{device}"));
        step.iter().for_each(|step| println!("{step}"));
        problems.iter().for_each(|problem| eprintln!("error: {problem}"));
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_REFUSED) })
}

impl DeviceArgs {
    /// Of the first device that is named, which is the fullest: each of several holds the whole model.
    fn plan(&self, plan: &MergePlan, prefix_cache_bytes: u64, problems: &mut Vec<String>) -> Result<Option<DevicePlan>, CommandError> {
        let choice = match (&self.device, self.device_memory) {
            (Some(choice), _) => choice.clone(),
            (None, Some(_)) => DeviceChoice::Auto,
            (None, None) => return Ok(None),
        };
        let reward = plan.reward().map_err(|error| CommandError::Other(error.to_string()))?;
        let told = self.device_memory.map(|bytes| bytes as u64);
        let places = match &choice {
            // What is told of another machine's device needs no device here.
            DeviceChoice::Places(places) if told.is_some() => places.clone(),
            choice => match choice.resolve() {
                Ok(places) => places,
                Err(error) => {
                    problems.push(format!("{error}; give --device-memory to plan for a device that is not here"));
                    return Ok(None);
                }
            },
        };
        let place = places.first().copied().unwrap_or(Place::Cpu);
        let dtype = plan.recipe().dtype();
        let on_one_base = members_on_one_base(plan, &[place], dtype).map(|bytes| bytes.total());
        let members_on_one_base = match (self.ensemble, on_one_base) {
            (Members::Adapters, Err(problem)) if plan.members().len() > 1 => {
                problems.push(format!("ensemble: expected members that are adapters on one base, found that {problem}"));
                None
            }
            (_, bytes) => bytes.ok(),
        };
        let request = DeviceRequest {
            memory: told.or_else(|| memory_of(place)),
            arithmetic: Arithmetic { dtype, batch_invariant: self.batch_invariant },
            ensemble: match self.ensemble {
                Members::Off => Ensemble::Off,
                Members::Resident => Ensemble::Resident,
                Members::Spread => Ensemble::Spread,
                Members::Adapters => Ensemble::Adapters,
                Members::Streamed => Ensemble::Streamed,
            },
            members: plan.members().len(),
            places,
            members_on_one_base,
            max_pack_tokens: self.max_pack_tokens.0,
            prefix_cache_bytes,
            swap: match self.swap {
                Takeover::Beside => Swap::Beside,
                Takeover::InPlace => Swap::InPlace,
            },
        };
        Ok(Some(DevicePlan::new(&request, reward.architecture, plan.manifest())))
    }
}

/// What this machine's device has in all; `None` where nobody says.
fn memory_of(place: Place) -> Option<u64> {
    match place {
        Place::Cpu => Some(memory_limit()).filter(|bytes| *bytes > 0),
        _ => card(place).map(|card| card.total_bytes),
    }
}

impl StepArgs {
    fn plan(&self, plan: &MergePlan, device: &DeviceArgs, remotes: Remotes) -> Result<Option<StepPlan>, CommandError> {
        let Some(workload) = self.workload else { return Ok(None) };
        let reward = plan.reward().map_err(|error| CommandError::Other(error.to_string()))?;
        let rate = match (self.tokens_per_second, &self.rate_from) {
            (Some(rate), _) => Some(Rate::Told(rate)),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path).map_err(|error| CommandError::file(path, error))?;
                let report: Value = serde_json::from_str(&text).map_err(|error| CommandError::file(path, error))?;
                Some(Rate::of_bench(&report, &path.display().to_string()).map_err(CommandError::Other)?)
            }
            (None, None) if self.measure => Some(self.measured(plan.recipe(), device, &workload, remotes)?),
            (None, None) => None,
        };
        Ok(Some(StepPlan::new(workload, reward.architecture, rate.as_ref(), self.step_seconds)))
    }

    fn measured(&self, recipe: &Recipe, device: &DeviceArgs, workload: &Workload, remotes: Remotes) -> Result<Rate, CommandError> {
        let clock = Clock::system();
        let max_pack_tokens = device.max_pack_tokens.0.unwrap_or(Place::Cpu.enough_pack_tokens());
        let spec = LoadSpec {
            max_pack_tokens: max_pack_tokens.max(workload.prompt as usize + workload.completion as usize),
            device: device.device.clone().unwrap_or_default(),
            batch_invariant: device.batch_invariant,
            // Recipes within this one are opened anew.
            remotes: Some(remotes),
            ..LoadSpec::new(recipe.clone())
        };
        let loaded = load_generation(&spec, GenerationId(1), &clock, &mut |_| {});
        let generation = loaded.map_err(|error| CommandError::Other(crate::app::with_causes(&error)))?;
        measure(&generation, workload, max_pack_tokens, &clock).map_err(CommandError::Other)
    }
}
