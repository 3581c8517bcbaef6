//! From a recipe to a generation that has answered: plan, name, merge while loading, members, warm-up.

use std::sync::{Arc, OnceLock};

use super::generation::{FingerprintParts, equipment};
use super::load::{arithmetic, calibration, hex, info, max_tokens, open_text, probes, warm_up};
use super::members::StreamedMembers;
use super::weights::{MergedModel, load_merged, remembered};
use super::{Calibration, Ensemble, Generation, GenerationParts, LoadError, LoadSpec, LoadedMember, MemberInfo, Progress};
use crate::checkpoint::{Dtype, Readout, SourceError, TensorSource};
use crate::clock::Clock;
use crate::domain::{Fingerprint, GenerationId, WeightsId};
use crate::merge::{MergePlan, Merged, PlannedMember, Reward};
use crate::model::{self, Apart, ApartBytes, Arithmetic, DeviceError, Devices, Origins, Place, RewardModel, SharedBase, What};
use crate::text::TextPipeline;

/// Plans, merges and loads a recipe, with its members if they are to stand on the device, and lets every model score the bundled
/// probes. Blocks for as long as it takes; reading runs in the current rayon pool. `progress` is called often.
pub fn load_generation(
    spec: &LoadSpec,
    id: GenerationId,
    clock: &Clock,
    progress: &mut dyn FnMut(Progress),
) -> Result<Generation, LoadError> {
    Prepared::open(spec, clock, progress)?.load(id, progress)
}

/// A recipe that can be loaded: its plan, its text layer and the reading of its head. No weights have been read.
pub struct Prepared {
    spec: LoadSpec,
    clock: Clock,
    plan: Arc<MergePlan>,
    text: Arc<TextPipeline>,
    readout: Readout,
    max_tokens: usize,
    /// Where it is to be loaded.
    on: On,
    /// The architecture and the reading of the head in their canonical form.
    canonical: String,
    calibration: Option<Calibration>,
    /// Made when weights are first read.
    merged: OnceLock<Arc<Merged>>,
    /// Known once the weights, or what is remembered of them, have been read.
    names: OnceLock<Names>,
}

/// Where models are loaded, and what their matrices are in there.
#[derive(Clone)]
struct On {
    places: Vec<Place>,
    arithmetic: Arithmetic,
}

/// The same, with the devices held: by one worker each are all models computed that are loaded onto them.
struct Opened {
    devices: Devices,
    arithmetic: Arithmetic,
}

impl On {
    fn open(&self) -> Result<Opened, DeviceError> {
        Ok(Opened { devices: Devices::open(&self.places)?, arithmetic: self.arithmetic })
    }
}

/// What names weights.
struct Names {
    weights_id: WeightsId,
    /// The content hash of every member.
    members: Vec<[u8; 32]>,
}

impl Prepared {
    /// Downloads what lies elsewhere, and plans.
    pub fn open(spec: &LoadSpec, clock: &Clock, progress: &mut dyn FnMut(Progress)) -> Result<Self, LoadError> {
        progress(Progress::step("plan", 0, 1));
        let (plan, text, readout) = open_text(spec, clock, &mut |place, done, total| progress(Progress::download(place, done, total)))?;
        let spec = &LoadSpec { recipe: plan.recipe().clone(), ..spec.clone() };
        let architecture = plan.reward()?.architecture;
        let max_tokens = max_tokens(spec, architecture)?;
        members_can_stand_alone(spec.ensemble, &plan)?;
        let arithmetic = Arithmetic { dtype: spec.recipe.dtype(), batch_invariant: spec.batch_invariant };
        let on = On { places: spec.device.resolve()?, arithmetic };
        if spec.ensemble == Ensemble::Adapters && plan.members().len() > 1 {
            members_on_one_base(&plan, &on.places, arithmetic.dtype).map_err(no_adapters)?;
        }
        // What is read and how is as much a part of a score as the body is.
        let canonical = serde_json::to_string(&(architecture, &readout))
            .map_err(|error| LoadError::Options { field: "architecture", problem: format!("has no canonical form: {error}") })?;
        let calibration = calibration(spec, architecture)?;
        let (spec, clock, text) = (spec.clone(), clock.clone(), Arc::new(text));
        progress(Progress::step("plan", 1, 1));
        let (merged, names) = (OnceLock::new(), OnceLock::new());
        Ok(Self { spec, clock, plan, text, readout, max_tokens, on, canonical, calibration, merged, names })
    }

    /// What is loaded, with what was fetched in folders here.
    pub fn spec(&self) -> &LoadSpec {
        &self.spec
    }

    pub fn plan(&self) -> &Arc<MergePlan> {
        &self.plan
    }

    /// Bytes of weights on each device once it is loaded, by the plan.
    pub fn device_bytes(&self) -> u64 {
        let On { places, arithmetic } = &self.on;
        let dtype = arithmetic.dtype;
        let merged = model::device_bytes_on(places, dtype, self.plan.manifest());
        let members = match (self.spec.ensemble, self.plan.members().len()) {
            // The merge of one is that one.
            (Ensemble::Resident | Ensemble::Spread | Ensemble::Adapters, 1) | (Ensemble::Off, _) => 0,
            (Ensemble::Resident, count) => merged.saturating_mul(count as u64),
            (Ensemble::Spread, count) => merged.saturating_mul(model::most_on_one(places, count) as u64),
            (Ensemble::Adapters, count) => match members_on_one_base(&self.plan, places, dtype) {
                Ok(bytes) => bytes.total(),
                // Refused when it was opened.
                Err(_) => merged.saturating_mul(count as u64),
            },
            (Ensemble::Streamed, _) => merged,
        };
        merged.saturating_add(members)
    }

    /// Bytes without which no device could score: the weights, and what placing them or the smallest packs take beside them.
    fn least_bytes(&self) -> Result<u64, LoadError> {
        let (On { places, arithmetic }, reward) = (&self.on, self.plan.reward()?);
        let activations = model::least_activation_bytes(places, *arithmetic, reward.architecture, self.max_tokens);
        let placing = model::placing_bytes(places, arithmetic.dtype, reward.layout);
        Ok(self.device_bytes().saturating_add(activations.max(placing)))
    }

    /// The most that its prefix caches hold once it is live.
    pub fn prefix_bytes(&self) -> u64 {
        let keeps = self.plan.reward().is_ok_and(|reward| model::keeps_prefixes(&self.on.places, reward.architecture));
        if keeps { self.spec.prefix_cache_bytes as u64 } else { 0 }
    }

    /// The name that the loaded generation will have. Reads every weight once, and keeps none, unless a cache remembers
    /// what is in files that have not changed since; what is loaded later must have the same bytes.
    pub fn fingerprint(&self, progress: &mut dyn FnMut(Progress)) -> Result<Fingerprint, LoadError> {
        Ok(self.name(self.names(progress)?.weights_id))
    }

    fn names(&self, progress: &mut dyn FnMut(Progress)) -> Result<&Names, LoadError> {
        if let Some(names) = self.names.get() {
            return Ok(names);
        }
        let (members, step) = (self.plan.members(), |progress: &mut dyn FnMut(Progress), done: usize| {
            progress(Progress::step("hash", done as u64, self.plan.members().len() as u64));
        });
        let names = match remembered(&self.plan, self.spec.cache.as_ref(), &self.clock) {
            Some((weights_id, members)) => Names { weights_id, members },
            None => {
                let merged = self.merged()?;
                for (done, member) in members.iter().enumerate() {
                    step(progress, done);
                    member.source().content_hash()?;
                }
                Names { weights_id: merged.weights_id()?, members: merged.member_hashes()? }
            }
        };
        step(progress, members.len());
        Ok(self.names.get_or_init(|| names))
    }

    /// What the generation will have beside its merged model.
    pub fn equipment(&self) -> Result<String, LoadError> {
        let hashes = &self.names(&mut |_| {})?.members;
        let member = |(member, hash): (&PlannedMember, &[u8; 32])| MemberInfo {
            name: member.name().clone(),
            coefficient: member.coefficient(),
            content_hash: hex(hash),
        };
        let members: Vec<_> = self.plan.members().iter().zip(hashes).map(member).collect();
        Ok(equipment(self.spec.ensemble.name(), &self.spec.members.matching(&members, &mut Vec::new())))
    }

    /// Merges and loads, and lets every model score the bundled probes.
    pub fn load(&self, id: GenerationId, progress: &mut dyn FnMut(Progress)) -> Result<Generation, LoadError> {
        model::has_room(&self.on.places, self.least_bytes()?)?;
        let (plan, text, readout) = (&self.plan, &self.text, &self.readout);
        let on = self.on.open()?;
        let mut load = |stage: &str, what: &str, one: One| {
            let mut tell = |done, total| progress(Progress::step(stage, done, total));
            load_model(&on, plan, readout, self.max_tokens, one, &mut tell).map_err(|error| error.within(what))
        };
        let mut load_it = |source: &dyn TensorSource| load("merge", "the merged model", One::everywhere(source));
        let MergedModel { model: merged, weights_id, members: hashes, notes, cache } =
            load_merged(plan, &|| self.merged(), self.spec.cache.as_ref(), &self.clock, &mut load_it)?;
        let mut resident = Vec::new();
        if let Ensemble::Resident | Ensemble::Spread | Ensemble::Adapters = self.spec.ensemble {
            // What members have in common is kept by them, not by this.
            let base = SharedBase::default();
            for (index, member) in plan.members().iter().enumerate() {
                let (name, stage) = (member.name().clone(), format!("member {}", member.name()));
                let bare = if self.spec.ensemble == Ensemble::Adapters { plan.member_bare(index)? } else { None };
                let origins = Origins { adapter: member.source().adapter() };
                let apart = bare.as_ref().map(|bare| Apart { base: &base, bare, origins });
                let lodges = (self.spec.ensemble == Ensemble::Spread).then_some(index);
                let model = match plan.member_source(index)? {
                    // The merge of one is that one.
                    _ if plan.members().len() == 1 => merged.clone(),
                    Some(source) => load(&stage, &stage, One { source: &source, apart, lodges })?,
                    None => unreachable!("every index below the number of members has a source"),
                };
                resident.push(LoadedMember { name, model });
            }
        }
        let models = 1 + resident.len() as u64;
        let probes = probes(text.as_ref(), readout)?;
        warm_up("the merged model", merged.as_ref(), &probes)?;
        progress(Progress::step("warm-up", 1, models));
        for (done, member) in resident.iter().enumerate() {
            warm_up(&format!("member {}", member.name), member.model.as_ref(), &probes)?;
            progress(Progress::step("warm-up", done as u64 + 2, models));
        }

        let (fingerprint, calibration) = (self.name(weights_id), self.calibration(weights_id).cloned());
        let mut info = info(&self.spec, plan, plan.reward()?, &hashes, text.policy(), readout, &self.clock);
        info.notes.extend(notes);
        info.devices = merged.runs_on();
        let (max_tokens, made_for) = (self.max_tokens, plan.reward()?.architecture.max_positions);
        if max_tokens > made_for {
            info.notes.push(format!("max_tokens is {max_tokens}; the model's config says that it is made for {made_for} positions"));
        }
        if calibration.is_none() && self.calibration.is_some() {
            info.notes.push("the calibration was measured on other weights, so it is not used".to_owned());
        }
        let member_calibrations = self.spec.members.matching(&info.members, &mut info.notes);
        if self.spec.ensemble == Ensemble::Adapters
            && let Ok(base) = plan.common_base()
        {
            info.notes.push(format!("members stand on the device as adapters on {}, which is there once", base.display()));
        }
        let streamed = (self.spec.ensemble == Ensemble::Streamed).then(|| {
            info.notes.push("members are streamed: every comparison loads each of them anew, one after another".to_owned());
            let (on, plan, readout) = (self.on.clone(), plan.clone(), readout.clone());
            Arc::new(FromPlan { on, plan, readout, max_tokens: self.max_tokens }) as Arc<dyn StreamedMembers>
        });
        let (text, prefix_bytes) = (text.clone(), self.spec.prefix_cache_bytes);
        let parts = GenerationParts {
            id,
            fingerprint,
            weights_id,
            text,
            merged,
            resident,
            streamed,
            calibration,
            member_calibrations,
            info,
            cache,
            prefix_bytes,
        };
        Ok(Generation::new(parts))
    }

    fn merged(&self) -> Result<Arc<Merged>, SourceError> {
        if let Some(merged) = self.merged.get() {
            return Ok(Arc::clone(merged));
        }
        let merged = Arc::new(Merged::new(self.plan.clone())?);
        Ok(Arc::clone(self.merged.get_or_init(|| merged)))
    }

    /// The calibration, unless it was measured on other weights than these.
    fn calibration(&self, weights_id: WeightsId) -> Option<&Calibration> {
        let other = self.spec.members.weights_id.as_ref().is_some_and(|measured| *measured != weights_id.to_string());
        self.calibration.as_ref().filter(|_| !other)
    }

    fn name(&self, weights_id: WeightsId) -> Fingerprint {
        let parts = FingerprintParts {
            weights_id,
            dtype: &arithmetic(self.on.arithmetic, &self.on.places),
            architecture: &self.canonical,
            text: self.text.hash(),
            max_tokens: self.max_tokens,
            calibration: self.calibration(weights_id),
        };
        parts.fingerprint()
    }
}

/// Whether the members can be asked one by one.
fn members_can_stand_alone(ensemble: Ensemble, plan: &MergePlan) -> Result<(), LoadError> {
    let lent = plan.members().iter().find_map(|member| Some((member.name(), member.lacks().first()?)));
    match lent.filter(|_| ensemble != Ensemble::Off) {
        None => Ok(()),
        Some((member, tensor)) => {
            let found = ensemble.name();
            let problem = format!(
                "expected off, found {found}: member {member} has no {tensor}, which a rule takes elsewhere, so it cannot score alone"
            );
            Err(LoadError::Options { field: "ensemble", problem })
        }
    }
}

/// What the members take on each device as what they have of one base, once, and what each has of its own; or why they are no
/// adapters on one base.
pub fn members_on_one_base(plan: &MergePlan, places: &[Place], dtype: Dtype) -> Result<ApartBytes, String> {
    plan.common_base()?;
    let layout = plan.reward().map_err(|error| error.to_string())?.layout;
    let adapters = plan.members().iter().map(|member| member.source().adapter());
    Ok(model::apart_bytes(places, dtype, layout, plan.manifest(), adapters))
}

fn no_adapters(found: String) -> LoadError {
    let problem = format!(
        "adapters: expected every member to be a LoRA adapter on one base (in one folder: `base:` of a member names it), found that {found}; \
         resident holds any members, each as a whole model, and streamed loads one at a time"
    );
    LoadError::Options { field: "ensemble", problem }
}

/// One of the models of a generation.
struct One<'a> {
    source: &'a dyn TensorSource,
    /// Where it is one of several on one base.
    apart: Option<Apart<'a>>,
    /// The number of the one device that it stands on, counted round and round; `None` for all of them.
    lodges: Option<usize>,
}

impl<'a> One<'a> {
    fn everywhere(source: &'a dyn TensorSource) -> Self {
        Self { source, apart: None, lodges: None }
    }
}

/// A model of the plan's architecture and reading, from a source of its weights.
fn load_model(
    on: &Opened,
    plan: &MergePlan,
    readout: &Readout,
    max_tokens: usize,
    One { source, apart, lodges }: One<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Arc<dyn RewardModel>, NotLoaded> {
    let Reward { architecture, layout, .. } = plan.reward().map_err(|error| NotLoaded::Load(error.into()))?;
    let what = What { source, apart, architecture, layout, readout, max_tokens };
    let model = match lodges {
        None => model::load_on(&on.devices, on.arithmetic, &what, progress),
        Some(number) => model::load_on_one(&on.devices, number, on.arithmetic, &what, progress),
    };
    model.map_err(NotLoaded::Model)
}

/// Why one model is not loaded.
enum NotLoaded {
    Load(LoadError),
    Model(model::LoadError),
}

impl NotLoaded {
    fn within(self, what: &str) -> LoadError {
        match self {
            Self::Load(error) => error,
            Self::Model(source) => LoadError::Model { what: what.to_owned(), source },
        }
    }
}

/// Members that are read from the plan's checkpoints once more. Bytes that differ from those that were merged are refused.
struct FromPlan {
    on: On,
    plan: Arc<MergePlan>,
    readout: Readout,
    max_tokens: usize,
}

impl StreamedMembers for FromPlan {
    fn load(&self, index: usize) -> Result<Arc<dyn RewardModel>, String> {
        let source = self.plan.member_source(index).map_err(|error| error.to_string())?;
        let source = source.ok_or_else(|| format!("the plan has no member {index}"))?;
        // Not those of the generation, on which packs run meanwhile.
        let on = self.on.open().map_err(|error| error.to_string())?;
        load_model(&on, &self.plan, &self.readout, self.max_tokens, One::everywhere(&source), &mut |_, _| {}).map_err(|error| match error {
            NotLoaded::Load(error) => error.to_string(),
            NotLoaded::Model(error) => error.to_string(),
        })
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
