//! One generation: everything that scores a request, and the fingerprint that names it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::SystemTime;

use super::ModelStamp;
use super::lanes::{Lane, Selections};
use super::lease::{self, Lease, leased, leased_text};
use super::members::{Running, StreamedMembers};
use super::probing::Remembered;
use super::table::Keyed;
use super::weights::CacheUse;
use crate::domain::{Failure, Fingerprint, GenerationId, MemberName, Sample, Score, Truncation, WeightsId};
use crate::model::{Limits, PrefixBytes, RewardModel};
use crate::text::{Before, Encoding};

/// The number of the meaning of a score. It rises when the same weights and text get another score on purpose.
pub const SCORE_SEMANTICS: u32 = 1;

/// Turns a sample into what the model reads. [`crate::text::TextPipeline`] is one; tests have others.
pub trait Encode: Send + Sync {
    fn encode(&self, sample: &Sample, truncation: Truncation) -> Result<Encoding, Failure>;

    /// The same for one of several samples, which may begin like what was read before.
    fn encode_beside(&self, sample: &Sample, truncation: Truncation, _before: &mut Before) -> Result<Encoding, Failure> {
        self.encode(sample, truncation)
    }
}

/// Where the rewards of a reference set lie: a calibrated reward is `(raw - mean) / std`.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    mean: f64,
    std: f64,
    samples: u64,
    source: String,
}

/// Numbers that cannot calibrate anything.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("calibration: expected a finite mean and a finite std above 0, found mean {mean} and std {std}")]
pub struct InvalidCalibration {
    pub mean: f64,
    pub std: f64,
}

impl Calibration {
    /// `samples` and `source` say what the numbers were measured on.
    pub fn new(mean: f64, std: f64, samples: u64, source: impl Into<String>) -> Result<Self, InvalidCalibration> {
        if !mean.is_finite() || !std.is_finite() || std <= 0.0 {
            return Err(InvalidCalibration { mean, std });
        }
        Ok(Self { mean, std, samples, source: source.into() })
    }

    pub fn mean(&self) -> f64 {
        self.mean
    }

    pub fn std(&self) -> f64 {
        self.std
    }

    pub fn samples(&self) -> u64 {
        self.samples
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// The reward in units of the calibration. May leave the range of float32, so it is checked again.
    pub fn apply(&self, raw: Score) -> Result<Score, crate::domain::NonFinite> {
        Score::try_from(((f64::from(raw.get()) - self.mean) / self.std) as f32)
    }
}

/// One member of the merge, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberInfo {
    pub name: MemberName,
    pub coefficient: f64,
    /// BLAKE3 over the member's tensors, in hex.
    pub content_hash: String,
}

/// How text becomes tokens, for people.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextInfo {
    pub bos: String,
    pub eos: String,
    pub pooling: String,
    pub reasoning: String,
    pub pad_token_id: Option<u32>,
    pub template_hash: String,
}

/// What a generation says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationInfo {
    /// `linear`, ...
    pub method: String,
    pub members: Vec<MemberInfo>,
    pub architecture: String,
    /// What the forward runs in, such as `float32`.
    pub dtype: String,
    pub devices: Vec<String>,
    /// As resolved.
    pub recipe: String,
    pub loaded: SystemTime,
    /// How the members can be asked: `resident`, `adapters`, `streamed` or `off`.
    pub ensemble: String,
    pub text: TextInfo,
    /// Rows of the embedding: token ids are below this.
    pub vocabulary: usize,
    /// What the head is and how its outputs become a reward.
    pub head: String,
    /// One name per output of the head, if there are several.
    pub output_names: Vec<String>,
    /// What a score depends on, sentence by sentence: what the operator should know (nothing loaded, ignored, unusual).
    pub notes: Vec<String>,
}

/// A member on the device, beside the merged model.
#[derive(Clone)]
pub struct LoadedMember {
    pub name: MemberName,
    pub model: Arc<dyn RewardModel>,
}

/// What a generation is made of.
pub struct GenerationParts {
    pub id: GenerationId,
    pub fingerprint: Fingerprint,
    pub weights_id: WeightsId,
    pub text: Arc<dyn Encode>,
    pub merged: Arc<dyn RewardModel>,
    /// In the order of `info.members`; empty where none stands on the device.
    pub resident: Vec<LoadedMember>,
    /// Where members are loaded from for each call that asks for them; only where none is resident.
    pub streamed: Option<Arc<dyn StreamedMembers>>,
    pub calibration: Option<Calibration>,
    /// Of the members that have one.
    pub member_calibrations: BTreeMap<MemberName, Calibration>,
    pub info: GenerationInfo,
    /// How the merged weights came.
    pub cache: CacheUse,
    /// Bytes of keys and values that its models keep together while it is live.
    pub prefix_bytes: usize,
}

/// Tokenizer, merged model, members and fingerprint, pinned by a request for its whole length. Immutable.
pub struct Generation {
    pub id: GenerationId,
    pub fingerprint: Fingerprint,
    pub weights_id: WeightsId,
    pub text: Arc<dyn Encode>,
    pub calibration: Option<Calibration>,
    pub info: GenerationInfo,
    pub(super) merged: Lane,
    pub(super) resident: Vec<(MemberName, Lane)>,
    /// The merged model, then every resident member.
    pub(super) ensemble: Lane,
    /// The merged model, then some of them.
    pub(super) selections: Selections,
    /// Dropped last: each model has a share of it.
    pub(super) lease: Arc<Lease>,
    pub(super) streamed: Option<Arc<dyn StreamedMembers>>,
    pub(super) member_calibrations: BTreeMap<MemberName, Calibration>,
    /// Where rewards lie, as far as members were asked.
    pub(super) running: Running,
    pub(super) cache: CacheUse,
    /// To the probes of the last canary.
    pub(super) answers: Remembered,
    pub(super) prefix_bytes: usize,
    was_live: AtomicBool,
    /// Tokens of a pack, where they were measured: zero where not.
    pack_tokens: AtomicUsize,
}

/// What is known of a generation, whether or not its weights are still there.
#[derive(Clone, Debug, PartialEq)]
pub struct Described {
    pub id: GenerationId,
    pub fingerprint: Fingerprint,
    pub weights_id: WeightsId,
    pub info: GenerationInfo,
    pub calibration: Option<Calibration>,
    /// Of the merged model.
    pub limits: Limits,
    /// Bytes that the merged model and the resident members take on the device.
    pub device_bytes: u64,
    /// Whether the members stand on the device beside the merged model.
    pub members_loaded: bool,
}

impl Described {
    /// As replies carry it.
    pub fn stamp(&self, instance: &str) -> ModelStamp {
        let Self { id, fingerprint, weights_id, .. } = self;
        ModelStamp { fingerprint: *fingerprint, generation: *id, instance: instance.to_owned(), weights_id: *weights_id }
    }
}

impl Keyed for Generation {
    type Key = Fingerprint;

    fn key(&self) -> Fingerprint {
        self.fingerprint
    }
}

impl Generation {
    pub fn new(parts: GenerationParts) -> Self {
        let GenerationParts { id, fingerprint, weights_id, text, merged, resident, streamed, .. } = parts;
        let GenerationParts { calibration, member_calibrations, info, cache, prefix_bytes, .. } = parts;
        let lease = Lease::new();
        let bare = merged.clone();
        let merged = leased(merged, &lease);
        // The merge of one may be that one.
        let lease_member = |model: Arc<dyn RewardModel>| if Arc::ptr_eq(&model, &bare) { merged.clone() } else { leased(model, &lease) };
        let resident: Vec<_> = resident.into_iter().map(|member| (member.name, lease_member(member.model))).collect();
        let ensemble = Lane::new(std::iter::once(merged.clone()).chain(resident.iter().map(|(_, model)| model.clone())));
        let resident = resident.into_iter().map(|(name, model)| (name, Lane::new([model]))).collect();
        let (merged, running) = (Lane::new([merged]), Running::default());
        Self {
            id,
            fingerprint,
            weights_id,
            text: leased_text(text),
            calibration,
            info,
            merged,
            resident,
            ensemble,
            selections: Selections::default(),
            lease,
            streamed,
            member_calibrations,
            running,
            cache,
            answers: Remembered::default(),
            prefix_bytes,
            was_live: AtomicBool::new(false),
            pack_tokens: AtomicUsize::new(0),
        }
    }

    /// Tokens that its packs may have, where they were measured.
    pub fn pack_tokens(&self) -> Option<usize> {
        Some(self.pack_tokens.load(Ordering::Relaxed)).filter(|tokens| *tokens > 0)
    }

    /// Remembers what was measured.
    pub fn set_pack_tokens(&self, tokens: usize) {
        self.pack_tokens.store(tokens, Ordering::Relaxed);
    }

    /// What stays known of it when it has gone.
    pub fn describe(&self) -> Described {
        Described {
            id: self.id,
            fingerprint: self.fingerprint,
            weights_id: self.weights_id,
            info: self.info.clone(),
            calibration: self.calibration.clone(),
            limits: self.limits(),
            device_bytes: self.device_bytes(),
            members_loaded: self.members_loaded(),
        }
    }

    /// The merged model.
    pub fn model(&self) -> &Arc<dyn RewardModel> {
        &self.merged.models[0]
    }

    /// Limits of the merged model.
    pub fn limits(&self) -> Limits {
        self.merged.models[0].limits()
    }

    /// Whether there are members to compare with.
    pub fn members_loaded(&self) -> bool {
        !self.resident.is_empty()
    }

    /// The members on the device, in order.
    pub fn resident(&self) -> impl Iterator<Item = &MemberName> {
        self.resident.iter().map(|(name, _)| name)
    }

    /// Whether members can be asked one after another, each loaded for the call.
    pub fn members_streamed(&self) -> bool {
        self.streamed.is_some()
    }

    /// What stands beside the merged model and reaches no score of it, hence no fingerprint: two generations of one
    /// fingerprint may differ in it.
    pub fn equipment(&self) -> String {
        equipment(&self.info.ensemble, &self.member_calibrations)
    }

    /// Bytes that the merged model and the resident members take on the device.
    pub fn device_bytes(&self) -> u64 {
        self.models().map(|model| model.limits().device_bytes).sum()
    }

    /// What its prefix caches hold, and may hold.
    pub fn prefix_bytes(&self) -> PrefixBytes {
        self.models().map(|model| model.prefix_bytes()).sum()
    }

    /// Merged model and resident members, each once.
    fn models(&self) -> impl Iterator<Item = &Arc<dyn RewardModel>> {
        let (merged, members) = (&self.merged.models[0], self.ensemble.models.iter().skip(1));
        std::iter::once(merged).chain(members.filter(move |member| !Arc::ptr_eq(member, merged)))
    }

    /// Prefixes are kept from now on: it goes live.
    pub(super) fn begin_prefixes(&self) {
        let each = self.prefix_bytes / self.models().count();
        if self.was_live.swap(true, Ordering::Relaxed) {
            // What it kept when it was live before may have to be freed yet.
            lease::keep_prefixes(self.models().cloned().collect(), each);
        } else {
            self.models().for_each(|model| model.keep_prefixes(each));
        }
    }

    /// It is live no more, and gives back what its caches hold.
    pub(super) fn end_prefixes(&self) {
        lease::keep_prefixes(self.models().cloned().collect(), 0);
    }
}

/// The equipment of a generation with this ensemble and these calibrations of its members.
pub(super) fn equipment(ensemble: &str, calibrations: &BTreeMap<MemberName, Calibration>) -> String {
    let calibrations = calibrations.iter().map(|(name, calibration)| format!("{name} {:?} {:?}", calibration.mean, calibration.std));
    format!("ensemble {ensemble}; {}", calibrations.collect::<Vec<_>>().join(", "))
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation").field("id", &self.id).field("fingerprint", &self.fingerprint).finish_non_exhaustive()
    }
}

/// Everything that a score depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct FingerprintParts<'a> {
    pub weights_id: WeightsId,
    /// What the forward runs in.
    pub dtype: &'a str,
    /// The architecture and the reading of the head in their canonical form; the head's weights are in `weights_id`.
    pub architecture: &'a str,
    /// Tokenizer, template and text policy.
    pub text: [u8; 32],
    /// The longest sample: what is longer fails or is cut.
    pub max_tokens: usize,
    pub calibration: Option<&'a Calibration>,
}

impl FingerprintParts<'_> {
    /// BLAKE3 over all parts, each with its name and length, and [`SCORE_SEMANTICS`].
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hasher = blake3::Hasher::new();
        let mut field = |name: &str, value: &[u8]| {
            for part in [name.as_bytes(), value] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        };
        field("semantics", &SCORE_SEMANTICS.to_le_bytes());
        field("weights", &self.weights_id.0);
        field("dtype", self.dtype.as_bytes());
        field("architecture", self.architecture.as_bytes());
        field("text", &self.text);
        field("max_tokens", &(self.max_tokens as u64).to_le_bytes());
        if let Some(calibration) = self.calibration {
            // Of the calibration only the numbers reach a score; where they come from does not.
            field("calibration", &[calibration.mean.to_le_bytes(), calibration.std.to_le_bytes()].concat());
        }
        Fingerprint(*hasher.finalize().as_bytes())
    }
}
