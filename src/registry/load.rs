//! From a recipe to a generation that has answered: plan, merge while loading, members, warm-up.

use std::path::PathBuf;
use std::sync::Arc;

use jiff::civil::DateTime;

use super::generation::{Encode, FingerprintParts};
use super::weights::{MergedModel, load_merged};
use super::{Calibration, Generation, GenerationInfo, GenerationParts, LoadedMember, MemberInfo, TextInfo};
use crate::checkpoint::{Architecture, Dtype, Pooling, SourceError, TensorSource};
use crate::clock::Clock;
use crate::domain::{Conversation, Failure, GenerationId, Sample, Score, Truncation};
use crate::merge::{CacheOptions, MergeError, MergePlan, NotServed, Recipe, Reward};
use crate::model::{self, Pack, RewardModel};
use crate::text::{BosPolicy, Encoding, EosPolicy, TemplateChoice, TextError, TextOptions, TextPipeline, TextPolicy};

/// Whether the members stand on the device beside the merged model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ensemble {
    #[default]
    Off,
    Resident,
}

/// What the operator says of the text, over what the checkpoints say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextOverrides {
    pub bos: BosPolicy,
    pub eos: EosPolicy,
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
    pub calibration: Option<Calibration>,
    /// Where merged weights are kept; `None` for nowhere.
    pub cache: Option<CacheOptions>,
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
            calibration: None,
            cache: None,
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
    /// `plan`, `merge`, `member NAME` or `warm-up`.
    pub stage: String,
    /// Bytes where `total` is a number of bytes, else steps.
    pub done: u64,
    pub total: u64,
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
    NotServed(#[from] NotServed),
    #[error("{field}: {problem}")]
    Options { field: &'static str, problem: String },
    #[error("{what} does not answer: {problem}")]
    WarmUp { what: String, problem: String },
}

impl Encode for TextPipeline {
    fn encode(&self, sample: &Sample, truncation: Truncation) -> Result<Encoding, Failure> {
        TextPipeline::encode(self, sample, truncation)
    }
}

/// The plan of a recipe and its text layer alone, without weights: what explains how a sample is read.
pub fn open_text(spec: &LoadSpec, clock: &Clock) -> Result<(Arc<MergePlan>, TextPipeline), LoadError> {
    let plan = Arc::new(MergePlan::open(&spec.recipe)?);
    let reward = plan.reward()?;
    let max_tokens = max_tokens(spec, reward.architecture)?;
    let text = TextPipeline::new(reward.text, text_options(spec, reward.architecture, max_tokens, clock))?;
    Ok((plan, text))
}

/// Plans, merges and loads a recipe, with its members if they are to be resident, and lets every model score the bundled
/// probes. Blocks for as long as it takes; reading runs in the current rayon pool. `progress` is called often.
pub fn load_generation(
    spec: &LoadSpec,
    id: GenerationId,
    clock: &Clock,
    progress: &mut dyn FnMut(Progress),
) -> Result<Generation, LoadError> {
    let mut report = |stage: &str, done: u64, total: u64| progress(Progress { stage: stage.to_owned(), done, total });
    report("plan", 0, 1);
    let (plan, text) = open_text(spec, clock)?;
    let (Reward { architecture, layout, .. }, text) = (plan.reward()?, Arc::new(text));
    let max_tokens = max_tokens(spec, architecture)?;
    report("plan", 1, 1);

    let mut load = |stage: &str, what: &str, source: &dyn TensorSource| {
        let mut tell = |done, total| report(stage, done, total);
        model::load(source, architecture, layout, max_tokens, &mut tell)
            .map_err(|source| LoadError::Model { what: what.to_owned(), source })
    };
    let mut load_it = |source: &dyn TensorSource| load("merge", "the merged model", source);
    let MergedModel { model: merged, weights_id, members: hashes, notes } = load_merged(&plan, spec.cache.as_ref(), clock, &mut load_it)?;
    let mut resident = Vec::new();
    if spec.ensemble == Ensemble::Resident {
        for (index, member) in plan.members().iter().enumerate() {
            let name = member.name().clone();
            let model = match plan.member_source(index)? {
                // The merge of one is that one.
                _ if plan.members().len() == 1 => merged.clone(),
                Some(source) => load(&format!("member {name}"), &format!("member {name}"), &source)?,
                None => unreachable!("every index below the number of members has a source"),
            };
            resident.push(LoadedMember { name, model });
        }
    }
    let models = 1 + resident.len() as u64;
    let probes = probes(text.as_ref())?;
    warm_up("the merged model", merged.as_ref(), &probes)?;
    report("warm-up", 1, models);
    for (done, member) in resident.iter().enumerate() {
        warm_up(&format!("member {}", member.name), member.model.as_ref(), &probes)?;
        report("warm-up", done as u64 + 2, models);
    }

    let dtype = dtype_name(spec.recipe.dtype());
    let canonical = serde_json::to_string(architecture)
        .map_err(|error| LoadError::Options { field: "architecture", problem: format!("has no canonical form: {error}") })?;
    let calibration = spec.calibration.clone();
    let parts =
        FingerprintParts { weights_id, dtype, architecture: &canonical, text: text.hash(), max_tokens, calibration: calibration.as_ref() };
    let fingerprint = parts.fingerprint();
    let mut info = info(spec, &plan, plan.reward()?, &hashes, text.policy(), clock);
    info.notes.extend(notes);
    Ok(Generation::new(GenerationParts { id, fingerprint, weights_id, text, merged, resident, calibration, info }))
}

fn max_tokens(spec: &LoadSpec, architecture: &Architecture) -> Result<usize, LoadError> {
    let (model, pack) = (architecture.max_positions, spec.max_pack_tokens);
    let wrong = |problem| Err(LoadError::Options { field: "max_tokens", problem });
    match spec.max_tokens {
        None => Ok(model.min(pack)),
        Some(0) => wrong("expected at least 1, found 0".to_owned()),
        Some(asked) if asked > model => wrong(format!("expected at most {model}, which the model is made for, found {asked}")),
        Some(asked) if asked > pack => wrong(format!("expected at most max_pack_tokens, which is {pack}, found {asked}")),
        Some(asked) => Ok(asked),
    }
}

fn text_options(spec: &LoadSpec, architecture: &Architecture, max_tokens: usize, clock: &Clock) -> TextOptions {
    // A clock before the year -9999 or after 9999 has no civil time; then the day is as good as any.
    let today = || jiff::Timestamp::try_from(clock.wall()).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let midnight = || today().to_zoned(jiff::tz::TimeZone::UTC).date().to_datetime(jiff::civil::Time::midnight());
    TextOptions {
        bos: spec.text.bos,
        eos: spec.text.eos,
        template: spec.text.template.clone(),
        reads_last_token: architecture.pooling == Pooling::LastNonPad,
        ..TextOptions::new(max_tokens, architecture.vocab_size, spec.text.template_time.unwrap_or_else(midnight))
    }
}

/// What a model must answer before it goes live: a conversation, where there is a template for it, and texts of a few lengths.
fn probes(text: &TextPipeline) -> Result<Vec<Arc<Encoding>>, LoadError> {
    let chat = Conversation::user("What is the capital of France?").answered("The capital of France is Paris.");
    let long = "A longer answer names its reasons one by one, and says what it does not know. ".repeat(8);
    let samples = [Sample::Conversation(chat), Sample::Text("Hello.".to_owned()), Sample::Text(long)];
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
fn warm_up(what: &str, model: &dyn RewardModel, probes: &[Arc<Encoding>]) -> Result<(), LoadError> {
    let wrong = |problem: String| LoadError::WarmUp { what: what.to_owned(), problem };
    let outputs = model.forward(&Pack::new(probes)).map_err(|error| wrong(error.to_string()))?;
    if outputs.len() != probes.len() {
        return Err(wrong(format!("expected scores of {} probes, found {}", probes.len(), outputs.len())));
    }
    for (i, output) in outputs.iter().enumerate() {
        if output.values.is_empty() {
            return Err(wrong("the head has no output".to_owned()));
        }
        if let Some(bad) = output.values.iter().find_map(|&value| Score::try_from(value).err()) {
            return Err(wrong(format!("probe {i}: {bad}")));
        }
    }
    Ok(())
}

fn info(
    spec: &LoadSpec,
    plan: &MergePlan,
    Reward { architecture, layout, .. }: Reward<'_>,
    hashes: &[[u8; 32]],
    policy: &TextPolicy,
    clock: &Clock,
) -> GenerationInfo {
    let members = plan.members().iter().zip(hashes).map(|(member, hash)| MemberInfo {
        name: member.name().clone(),
        coefficient: member.coefficient(),
        content_hash: blake3::Hash::from(*hash).to_hex().to_string(),
    });
    let outputs = layout.outputs();
    let label = |i: usize| plan.config().pointer(&format!("/id2label/{i}")).and_then(|label| label.as_str()).map(str::to_owned);
    let names = (0..outputs).map(|i| label(i).unwrap_or_else(|| format!("LABEL_{i}")));
    GenerationInfo {
        method: spec.recipe.method().name().to_owned(),
        members: members.collect(),
        architecture: architecture.model_type.clone(),
        dtype: dtype_name(spec.recipe.dtype()).to_owned(),
        devices: vec!["cpu".to_owned()],
        recipe: spec.recipe.to_resolved_string(),
        loaded: clock.wall(),
        text: TextInfo {
            bos: policy.bos.name().to_owned(),
            eos: policy.eos.name().to_owned(),
            pooling: architecture.pooling.name().to_owned(),
            reasoning: policy.reasoning.to_owned(),
            pad_token_id: architecture.pad_token_id,
            template_hash: policy.template_hash.clone().unwrap_or_default(),
        },
        vocabulary: architecture.vocab_size,
        output_names: if outputs > 1 { names.collect() } else { Vec::new() },
        notes: plan.notes().to_vec(),
    }
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

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
