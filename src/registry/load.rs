//! What is to be loaded, how its text and its head are read, and what a loaded model must answer.

mod describe;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::civil::DateTime;

use describe::{describe, output_names, place, remarks};

use super::generation::Encode;
use super::{Calibration, GenerationInfo, MemberInfo, TextInfo};
use crate::checkpoint::remote::Remotes;
use crate::checkpoint::{Architecture, Dtype, Layout, Readout, SourceError, reads_steps};
use crate::clock::Clock;
use crate::domain::{Conversation, Failure, MemberName, Sample, Score, Truncation};
use crate::merge::{CacheOptions, Downloads, MergeError, MergePlan, NotServed, Recipe, Reward};
use crate::model::{self, Arithmetic, DeviceChoice, DeviceError, Output, Pack, Place, RewardModel};
use crate::text::{
    Before, BosPolicy, Encoding, EosPolicy, ReasoningPolicy, TemplateChoice, TextError, TextOptions, TextPipeline, TextPolicy,
};

/// Whether, and how, the members stand on the device beside the merged model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ensemble {
    #[default]
    Off,
    /// All of them, for as long as the generation is there.
    Resident,
    /// Likewise, but each on one of the devices alone.
    Spread,
    /// All of them on every device, but the base that all of them are adapters on stands there once, and of each member what is its own.
    Adapters,
    /// Each is loaded for every call that asks for it, one after another through one place.
    Streamed,
}

impl Ensemble {
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Resident => "resident",
            Self::Spread => "spread",
            Self::Adapters => "adapters",
            Self::Streamed => "streamed",
        }
    }
}

/// What the operator says of the text, over what the checkpoints say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextOverrides {
    pub bos: BosPolicy,
    pub eos: EosPolicy,
    pub reasoning: ReasoningPolicy,
    pub template: TemplateChoice,
    /// The time that templates see; `None` for midnight (UTC) of the day of the load.
    pub template_time: Option<DateTime>,
}

/// What is to be loaded.
#[derive(Clone, Debug)]
pub struct LoadSpec {
    pub recipe: Recipe,
    pub ensemble: Ensemble,
    pub text: TextOverrides,
    /// The longest sample; `None` for what the model is made for, as far as a pack can hold it.
    pub max_tokens: Option<usize>,
    /// The scorer's, which no sample may exceed.
    pub max_pack_tokens: usize,
    /// Bytes of keys and values that the generation's models keep together; 0 for none.
    pub prefix_cache_bytes: usize,
    pub device: DeviceChoice,
    /// Equal bits in any company also where our kernels do not compute.
    pub batch_invariant: bool,
    pub calibration: CalibrationChoice,
    /// Where members that are not folders come from.
    pub remotes: Option<Remotes>,
    /// Where merged weights are kept; `None` for nowhere.
    pub cache: Option<CacheOptions>,
    /// What the calibration was measured on, where that is known, and those of the members.
    pub members: MeasuredMembers,
}

/// Calibrations of members, and the weights that all of them were measured on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MeasuredMembers {
    /// Of the merged model, in hex; `None` where nobody says.
    pub weights_id: Option<String>,
    /// Name, content hash in hex where one is known, and statistics.
    pub members: Vec<(MemberName, Option<String>, Calibration)>,
}

impl MeasuredMembers {
    /// Calibrations of members that still have the weights that they were measured with. A note for each that has not.
    pub(super) fn matching(&self, infos: &[MemberInfo], notes: &mut Vec<String>) -> BTreeMap<MemberName, Calibration> {
        let mut matching = BTreeMap::new();
        for (name, hash, calibration) in &self.members {
            let Some(info) = infos.iter().find(|info| info.name == *name) else { continue };
            if hash.as_ref().is_none_or(|hash| *hash == info.content_hash) {
                matching.insert(name.clone(), calibration.clone());
            } else {
                notes.push(format!("the calibration of member {name} was measured on other weights, so it is not used"));
            }
        }
        matching
    }
}

/// Where calibrated rewards come from.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum CalibrationChoice {
    #[default]
    None,
    Given(Calibration),
    /// The mean and std of training rewards in the config of the only member (OpenRLHF).
    FromConfig,
}

impl LoadSpec {
    /// The defaults for a recipe.
    pub fn new(recipe: Recipe) -> Self {
        let max_pack_tokens = crate::scorer::ScorerOptions::default().max_pack_tokens;
        Self {
            recipe,
            ensemble: Ensemble::Off,
            text: TextOverrides::default(),
            max_tokens: None,
            max_pack_tokens,
            prefix_cache_bytes: 0,
            device: DeviceChoice::Places(vec![Place::Cpu]),
            batch_invariant: false,
            calibration: CalibrationChoice::None,
            remotes: None,
            cache: None,
            members: MeasuredMembers::default(),
        }
    }

    /// The uniform average of some folders, with the defaults.
    pub fn uniform(paths: &[PathBuf]) -> Result<Self, crate::merge::RecipeError> {
        Recipe::uniform(paths).map(Self::new)
    }
}

/// How far a load has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// `download PLACE`, `plan`, `merge`, `member NAME` or `warm-up`.
    pub stage: String,
    /// Bytes where `total` is a number of bytes, else steps.
    pub done: u64,
    pub total: u64,
}

impl Progress {
    pub fn step(stage: &str, done: u64, total: u64) -> Self {
        Self { stage: stage.to_owned(), done, total }
    }

    /// Of what is fetched from this place.
    pub fn download(place: &str, done: u64, total: u64) -> Self {
        Self { stage: format!("download {place}"), done, total }
    }
}

/// Why there is no generation.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Merge(#[from] MergeError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("cannot read the weights: {0}")]
    Source(#[from] SourceError),
    #[error("cannot load {what}")]
    Model { what: String, source: model::LoadError },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    NotServed(#[from] NotServed),
    #[error("{field}: {problem}")]
    Options { field: &'static str, problem: String },
    #[error("the head cannot be read: {}", .0.join("; "))]
    Readout(Vec<String>),
    #[error("{what} does not answer: {problem}")]
    WarmUp { what: String, problem: String },
}

impl Encode for TextPipeline {
    fn encode(&self, sample: &Sample, truncation: Truncation) -> Result<Encoding, Failure> {
        TextPipeline::encode(self, sample, truncation)
    }

    fn encode_beside(&self, sample: &Sample, truncation: Truncation, before: &mut Before) -> Result<Encoding, Failure> {
        TextPipeline::encode_beside(self, sample, truncation, before)
    }
}

/// The plan of a recipe, its text layer and the reading of its head, without weights: what explains how a sample is read. What
/// lies elsewhere is fetched.
pub fn open_text(spec: &LoadSpec, clock: &Clock, downloads: Downloads<'_>) -> Result<(Arc<MergePlan>, TextPipeline, Readout), LoadError> {
    let plan = Arc::new(MergePlan::fetch(&spec.recipe, spec.remotes.as_ref(), downloads)?);
    let reward = plan.reward()?;
    let Reward { architecture, layout, text } = reward;
    let max_tokens = max_tokens(spec, architecture)?;
    let text = TextPipeline::new(text, text_options(spec, architecture, layout, max_tokens, clock))?;
    let readout = Readout::resolve(architecture, layout, &output_names(&plan, layout), &text).map_err(LoadError::Readout)?;
    Ok((plan, text.reading(readout.clone()), readout))
}

pub(super) fn max_tokens(spec: &LoadSpec, architecture: &Architecture) -> Result<usize, LoadError> {
    let (model, pack) = (architecture.max_positions, spec.max_pack_tokens);
    let wrong = |problem| Err(LoadError::Options { field: "max_tokens", problem });
    match spec.max_tokens {
        None => Ok(model.min(pack)),
        Some(0) => wrong("expected at least 1, found 0".to_owned()),
        Some(asked) if architecture.longest().is_some_and(|longest| asked > longest) => {
            wrong(format!("expected at most {model}, as many as the model has positions for, found {asked}"))
        }
        Some(asked) if asked > pack => wrong(format!("expected at most max_pack_tokens, which is {pack}, found {asked}")),
        Some(asked) => Ok(asked),
    }
}

fn text_options(spec: &LoadSpec, architecture: &Architecture, layout: &Layout, max_tokens: usize, clock: &Clock) -> TextOptions {
    // A clock before the year -9999 or after 9999 has no civil time; then the day is as good as any.
    let today = || jiff::Timestamp::try_from(clock.wall()).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let midnight = || today().to_zoned(jiff::tz::TimeZone::UTC).date().to_datetime(jiff::civil::Time::midnight());
    let pooling = layout.head.pooling.unwrap_or(architecture.pooling);
    TextOptions {
        bos: spec.text.bos,
        eos: spec.text.eos,
        template: spec.text.template.clone(),
        reasoning: spec.text.reasoning,
        reads_last_token: reads_steps(&architecture.head) || pooling.reads_the_end(),
        closing: architecture.head.reward_token,
        ..TextOptions::new(max_tokens, architecture.vocab_size, spec.text.template_time.unwrap_or_else(midnight))
    }
}

pub(super) fn calibration(spec: &LoadSpec, architecture: &Architecture) -> Result<Option<Calibration>, LoadError> {
    let wrong = |problem: String| LoadError::Options { field: "calibration", problem };
    match &spec.calibration {
        CalibrationChoice::None => Ok(None),
        CalibrationChoice::Given(calibration) => Ok(Some(calibration.clone())),
        CalibrationChoice::FromConfig if spec.recipe.members().len() != 1 => {
            let count = spec.recipe.members().len();
            Err(wrong(format!(
                "a config's mean and std are those of one member, and a merge of {count} has others: measure them on the merged model"
            )))
        }
        CalibrationChoice::FromConfig => {
            let (mean, std) = architecture.head.normal.ok_or_else(|| wrong("the config holds no mean and std".to_owned()))?;
            Calibration::new(mean, std, 0, "config.json (OpenRLHF)").map(Some).map_err(|error| wrong(error.to_string()))
        }
    }
}

/// What a model must answer before it goes live: a conversation, where there is a template for it, texts of a few lengths,
/// and the tokens that its head looks for.
pub(super) fn probes(text: &TextPipeline, readout: &Readout) -> Result<Vec<Arc<Encoding>>, LoadError> {
    let chat = Conversation::user("What is the capital of France?").answered("The capital of France is Paris.");
    let long = "A longer answer names its reasons one by one, and says what it does not know. ".repeat(8);
    let mut samples = vec![Sample::Conversation(chat), Sample::Text("Hello.".to_owned()), Sample::Text(long)];
    let looked_for = readout.probe();
    if !looked_for.is_empty() {
        samples.push(Sample::Tokens(looked_for));
    }
    let encoded: Vec<Result<Encoding, Failure>> = samples.iter().map(|sample| text.encode(sample, Truncation::Left)).collect();
    let probes: Vec<_> = encoded.iter().flatten().cloned().map(Arc::new).collect();
    match encoded.into_iter().find_map(Result::err) {
        // A model without a template, or with one that refuses the probe, still scores text.
        Some(failure) if probes.is_empty() => {
            Err(LoadError::WarmUp { what: "the tokenizer".to_owned(), problem: format!("no probe can be encoded: {failure}") })
        }
        _ => Ok(probes),
    }
}

/// Every probe gets a finite score.
pub(super) fn warm_up(what: &str, model: &dyn RewardModel, probes: &[Arc<Encoding>]) -> Result<(), LoadError> {
    let wrong = |problem: String| LoadError::WarmUp { what: what.to_owned(), problem };
    // On every device that holds it.
    for device in 0..model.runs_on().len() {
        let outputs = model.forward_on(device, &Pack::new(probes)).map_err(|error| wrong(error.to_string()))?;
        check_probes(&outputs, probes.len()).map_err(wrong)?;
    }
    Ok(())
}

fn check_probes(outputs: &[Output], expected: usize) -> Result<(), String> {
    if outputs.len() != expected {
        return Err(format!("expected scores of {expected} probes, found {}", outputs.len()));
    }
    for (i, output) in outputs.iter().enumerate() {
        if output.values.is_empty() && output.steps.is_empty() {
            return Err("the head has no output".to_owned());
        }
        if let Some(bad) = output.values.iter().chain([&output.reward]).find_map(|&value| Score::try_from(value).err()) {
            return Err(format!("probe {i}: {bad}"));
        }
    }
    Ok(())
}

pub(super) fn info(
    spec: &LoadSpec,
    plan: &MergePlan,
    reward: Reward<'_>,
    hashes: &[[u8; 32]],
    policy: &TextPolicy,
    readout: &Readout,
    clock: &Clock,
) -> GenerationInfo {
    let Reward { architecture, layout, .. } = reward;
    let members = plan.members().iter().zip(hashes).map(|(member, hash)| MemberInfo {
        name: member.name().clone(),
        coefficient: member.coefficient(),
        content_hash: hex(hash),
    });
    let outputs = output_names(plan, layout);
    GenerationInfo {
        method: spec.recipe.method().name().to_owned(),
        members: members.collect(),
        architecture: architecture.model_type.clone(),
        dtype: dtype_name(spec.recipe.dtype()).to_owned(),
        devices: Vec::new(),
        recipe: spec.recipe.to_resolved_string(),
        loaded: clock.wall(),
        ensemble: spec.ensemble.name().to_owned(),
        text: TextInfo {
            bos: policy.bos.name().to_owned(),
            eos: policy.closing.map_or_else(|| policy.eos.name().to_owned(), |id| format!("ensure token {id}")),
            pooling: place(readout),
            reasoning: policy.reasoning.name().to_owned(),
            pad_token_id: architecture.pad_token_id,
            template_hash: policy.template_hash.clone().unwrap_or_default(),
        },
        vocabulary: architecture.vocab_size,
        head: describe(layout, readout),
        notes: plan.notes().iter().cloned().chain(remarks(plan, reward, readout)).collect(),
        output_names: if outputs.len() > 1 { outputs } else { Vec::new() },
    }
}

/// A hash as people read it.
pub(super) fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from(*hash).to_hex().to_string()
}

/// What a score depends on beside the weights: the CPU computes in float32 whatever they were rounded to, other devices in
/// what they are rounded to.
pub(super) fn arithmetic(arithmetic: Arithmetic, places: &[Place]) -> String {
    let name = dtype_name(arithmetic.dtype);
    if places.contains(&Place::Cpu) {
        return name.to_owned();
    }
    let shapes = if arithmetic.batch_invariant { ", fixed shapes" } else { "" };
    if arithmetic.dtype == Dtype::F32 { format!("{name}{shapes}") } else { format!("{name} in {name}{shapes}") }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float32",
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 => "float16",
        // No recipe has another one, but a name is no reason to fail.
        other => other.safetensors_name(),
    }
}
