//! Fakes for tests of this layer and of those above it: a model whose score is a pure function of the token ids, with
//! hooks, and a text pipeline of one token per byte.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::clock::Clock;
use crate::domain::{Failure, FailureKind, Fingerprint, MemberName, Sample, Truncation, WeightsId};
use crate::model::{Limits, ModelError, Output, Pack, PrefixBytes, RewardModel};
use crate::scorer::{ScorerHandle, ScorerMetrics, ScorerOptions, Worker, pair};
use crate::text::Encoding;

/// A token that makes the forward panic, fail, or give NaN for the samples that begin with it.
pub(crate) const PANIC: u32 = 1_000_001;
pub(crate) const FAIL: u32 = 1_000_002;
pub(crate) const NAN: u32 = 1_000_003;
/// A token that breaks the device for good.
pub(crate) const LOST: u32 = 1_000_004;

/// Called with the ids of every sample of a pack before it is scored.
pub(crate) type Hook = Box<dyn Fn(&[Vec<u32>]) + Send + Sync>;

/// Scores `factor * sum(id * (position + 1))`.
pub(crate) struct FakeModel {
    pub factor: f32,
    pub outputs: usize,
    pub forwards: AtomicU64,
    pub hook: Mutex<Option<Hook>>,
    /// What it was told to keep last.
    pub kept: AtomicUsize,
}

impl FakeModel {
    /// Bytes of prefixes that it says it holds, as long as it may hold any.
    pub const HELD: u64 = 7;

    pub fn new(factor: f32) -> Arc<Self> {
        Arc::new(Self::bare(factor))
    }

    pub fn bare(factor: f32) -> Self {
        Self { factor, outputs: 1, forwards: AtomicU64::new(0), hook: Mutex::new(None), kept: AtomicUsize::new(0) }
    }

    pub fn hooked(factor: f32, hook: impl Fn(&[Vec<u32>]) + Send + Sync + 'static) -> Arc<Self> {
        let model = Self::new(factor);
        *model.hook.lock().expect("no panic under the lock") = Some(Box::new(hook));
        model
    }

    pub fn score(&self, ids: &[u32]) -> f32 {
        self.factor * ids.iter().enumerate().map(|(i, &id)| id as f32 * (i + 1) as f32).sum::<f32>()
    }
}

impl RewardModel for FakeModel {
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        self.forwards.fetch_add(1, Ordering::Relaxed);
        let samples: Vec<Vec<u32>> = pack_ids(pack);
        if let Ok(Some(hook)) = self.hook.lock().as_deref() {
            hook(&samples);
        }
        if samples.iter().any(|ids| ids[0] == FAIL) {
            return Err(ModelError::Failed("asked to fail".to_owned()));
        }
        if samples.iter().any(|ids| ids[0] == LOST) {
            return Err(ModelError::DeviceLost("CUDA_ERROR_LAUNCH_FAILED".to_owned()));
        }
        assert!(!samples.iter().any(|ids| ids[0] == PANIC), "asked to panic");
        let value = |ids: &Vec<u32>| if ids[0] == NAN { f32::NAN } else { self.score(ids) };
        let output = |ids: &Vec<u32>| Output {
            reward: value(ids),
            values: vec![value(ids); self.outputs],
            steps: Vec::new(),
            pooled_position: ids.len() - 1,
            shared_tokens: 0,
            cached_tokens: 0,
        };
        Ok(samples.iter().map(output).collect())
    }

    fn limits(&self) -> Limits {
        Limits { max_tokens: 64, outputs: self.outputs, parameters: 1, device_bytes: 4 }
    }

    fn keep_prefixes(&self, bytes: usize) {
        self.kept.store(bytes, Ordering::Relaxed);
    }

    fn prefix_bytes(&self) -> PrefixBytes {
        let bound = self.kept.load(Ordering::Relaxed) as u64;
        PrefixBytes { held: bound.min(Self::HELD), bound }
    }
}

/// The ids of every sample of a pack: the one place of the tests that looks into it.
fn pack_ids(pack: &Pack) -> Vec<Vec<u32>> {
    (0..pack.len()).map(|sample| pack.encoding(sample).ids().to_vec()).collect()
}

/// One token per byte of text, at most 64; conversations are refused as a template would.
pub(crate) struct FakeText;

impl Encode for FakeText {
    fn encode(&self, sample: &Sample, truncation: Truncation) -> Result<Encoding, Failure> {
        let mut ids: Vec<u32> = match sample {
            Sample::Text(text) => text.bytes().map(u32::from).collect(),
            Sample::Tokens(ids) => ids.clone(),
            Sample::Pair { .. } => panic!("asked to panic"),
            Sample::Conversation(_) => return Err(Failure::new(FailureKind::TemplateRefused, "no template")),
        };
        if ids.is_empty() {
            return Err(Failure::new(FailureKind::Empty, "no tokens"));
        }
        let cut = ids.len() > 64;
        match truncation {
            _ if ids.len() <= 64 => {}
            Truncation::Refuse => return Err(Failure::new(FailureKind::TooLong, "more than 64 tokens")),
            Truncation::Left => drop(ids.drain(..ids.len() - 64)),
            Truncation::Right => ids.truncate(64),
        }
        let encoding = Encoding::for_test(ids);
        Ok(if cut { encoding.cut() } else { encoding })
    }
}

/// A generation of fakes: `factor` is in its scores and in its fingerprint.
pub(crate) fn generation(id: u64, merged: Arc<FakeModel>, members: &[(&str, Arc<FakeModel>)]) -> Generation {
    Generation::new(parts(id, merged, members))
}

/// The same without members, with another text layer.
pub(crate) fn generation_reading(id: u64, merged: Arc<FakeModel>, text: Arc<dyn Encode>) -> Generation {
    Generation::new(GenerationParts { text, ..parts(id, merged, &[]) })
}

fn parts(id: u64, merged: Arc<FakeModel>, members: &[(&str, Arc<FakeModel>)]) -> GenerationParts {
    let name = |name: &str| MemberName::try_from(name.to_owned()).expect("a plain name");
    let mut fingerprint = [0; 32];
    fingerprint[..4].copy_from_slice(&merged.factor.to_be_bytes());
    GenerationParts {
        id: crate::domain::GenerationId(id),
        fingerprint: Fingerprint(fingerprint),
        weights_id: WeightsId([7; 32]),
        text: Arc::new(FakeText),
        merged,
        resident: members.iter().map(|(member, model)| LoadedMember { name: name(member), model: model.clone() }).collect(),
        streamed: None,
        calibration: None,
        member_calibrations: std::collections::BTreeMap::new(),
        info: GenerationInfo {
            method: "linear".to_owned(),
            members: ["rm-0", "rm-1"]
                .map(|member| MemberInfo { name: name(member), coefficient: 0.5, content_hash: "00".to_owned() })
                .to_vec(),
            architecture: "fake".to_owned(),
            dtype: "float32".to_owned(),
            devices: vec!["cpu".to_owned()],
            recipe: String::new(),
            loaded: std::time::SystemTime::UNIX_EPOCH,
            ensemble: if members.is_empty() { "off" } else { "resident" }.to_owned(),
            text: TextInfo::default(),
            vocabulary: 256,
            head: String::new(),
            output_names: Vec::new(),
            notes: Vec::new(),
        },
        cache: CacheUse::Off,
        prefix_bytes: 0,
    }
}

/// An engine on a worker that the test steps by hand.
pub(crate) fn stepped(options: ScorerOptions, clock: Clock) -> (Engine, Worker) {
    let (scorer, worker) = pair(options, clock.clone(), ScorerMetrics::unregistered());
    (engine_on(scorer, clock), worker)
}

/// An engine without a generation, which holds none after it was live.
pub(crate) fn engine_on(scorer: ScorerHandle, clock: Clock) -> Engine {
    engine_keeping(scorer, clock, 0)
}

/// An engine without a generation.
pub(crate) fn engine_keeping(scorer: ScorerHandle, clock: Clock, keep: usize) -> Engine {
    engine_watched(scorer, clock, keep, None)
}

/// An engine without a generation, that is watched.
pub(crate) fn engine_watched(scorer: ScorerHandle, clock: Clock, keep: usize, watch: Option<Watch>) -> Engine {
    let parts = EngineParts { registry: Registry::new(RegistryMetrics::unregistered(), keep), scorer, clock, watch };
    let options = EngineOptions { instance: "test".to_owned(), tokenizer_threads: 1, ..EngineOptions::default() };
    Engine::new(parts, options).expect("a thread")
}
