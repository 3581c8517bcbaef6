//! Models on several devices. Each device has a worker. A model that is on all of them is scored by each worker on its own; one
//! that is on one of them is scored there by whichever worker has the pack, in turn with the worker of that device.

use std::panic::resume_unwind;
use std::sync::Arc;

use super::device::{Arithmetic, Backend, DeviceError, Devices, Place, Turns};
use super::{
    Limits, LoadError, Model, ModelError, Output, Pack, PrefixBytes, PrefixKey, RewardModel, SharedBase, StandsFor, What, load_with,
};

/// At least one model, all the same but for where they are.
pub struct Replicas {
    first: Model,
    others: Vec<Model>,
    turns: Turns,
}

/// One model that stands on one of the devices alone.
pub struct Lodger {
    pub model: Model,
    device: usize,
    /// Whether that is the one that most of such models are on.
    fullest: bool,
    turns: Turns,
}

/// [`load`](super::load) onto one device or several, each of which then holds the whole model: the source is read once, and
/// copied to all others at the same time. Every device has settled when this returns, so any thread may use the model.
pub fn load_on(
    devices: &Devices,
    arithmetic: impl Into<Arithmetic>,
    what: &What<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Arc<dyn RewardModel>, LoadError> {
    let backends = devices.backends(arithmetic.into(), what.architecture);
    let (first, rest) = backends.split_first().ok_or_else(|| DeviceError { place: String::new(), problem: "none named".to_owned() })?;
    let model = load_with(first, what, progress)?;
    if rest.is_empty() {
        return Ok(Arc::new(model));
    }
    let copies = copies(&model, rest, what.apart.map(|apart| apart.base))?;
    Ok(Arc::new(Replicas::new(model, copies, devices.turns())))
}

/// [`load_on`] onto one of the devices alone, the `number`th, or of so many more as there are, the first again. Workers of all
/// devices may score by it; it takes turns with what is on all of them.
pub fn load_on_one(
    devices: &Devices,
    number: usize,
    arithmetic: impl Into<Arithmetic>,
    what: &What<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Arc<dyn RewardModel>, LoadError> {
    let backends = devices.backends(arithmetic.into(), what.architecture);
    let first = backends.first().ok_or_else(|| DeviceError { place: String::new(), problem: "none named".to_owned() })?;
    let device = number % backends.len();
    let fullest = backends[device].place == first.place;
    Ok(Arc::new(Lodger::new(load_with(&backends[device], what, progress)?, device, fullest, devices.turns())))
}

/// The same model on every one of these, copied by a thread each.
pub fn copies(model: &Model, backends: &[Backend], base: Option<&SharedBase>) -> Result<Vec<Model>, LoadError> {
    std::thread::scope(|scope| {
        let copying: Vec<_> = backends.iter().map(|backend| scope.spawn(move || model.on(backend, base))).collect();
        copying.into_iter().map(|copy| copy.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

impl Replicas {
    pub fn new(first: Model, others: Vec<Model>, turns: Turns) -> Self {
        Self { first, others, turns }
    }

    fn on(&self, device: usize) -> Option<&Model> {
        device.checked_sub(1).map_or(Some(&self.first), |other| self.others.get(other))
    }

    pub fn each(&self) -> impl Iterator<Item = &Model> {
        std::iter::once(&self.first).chain(&self.others)
    }
}

impl RewardModel for Replicas {
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        self.forward_on(0, pack)
    }

    fn forward_on(&self, device: usize, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        let none = || ModelError::Failed(format!("there is no device number {device}"));
        let model = self.on(device).ok_or_else(none)?;
        let _turn = self.turns.take(device);
        model.forward(pack)
    }

    fn prepare(&self, device: usize, pack: &Pack) {
        if let Some(model) = self.on(device) {
            model.prepare(device, pack);
        }
    }

    fn runs_on(&self) -> Vec<String> {
        self.each().flat_map(RewardModel::runs_on).collect()
    }

    fn limits(&self) -> Limits {
        // What is said of bytes is said of one device: each must have room for all of them.
        self.first.limits()
    }

    fn prefix_key(&self, tokens: usize) -> Option<PrefixKey> {
        self.first.prefix_key(tokens)
    }

    fn keep_prefixes(&self, bytes: usize) {
        // Each keeps what its own packs leave.
        let each = bytes / (1 + self.others.len());
        self.each().for_each(|model| model.keep_prefixes(each));
    }

    fn prefix_bytes(&self) -> PrefixBytes {
        self.each().map(RewardModel::prefix_bytes).sum()
    }

    fn token_cost(&self, from: usize, to: usize) -> usize {
        self.first.token_cost(from, to)
    }

    fn activation_bytes(&self, tokens: usize) -> Option<u64> {
        self.first.activation_bytes(tokens)
    }
}

/// Of so many models that each stand on one of these devices, how many are on the fullest. Several workers on one CPU share it.
pub fn most_on_one(places: &[Place], models: usize) -> usize {
    let same = places.iter().filter(|place| places.first() == Some(*place)).count();
    // Round and round: so many whole rounds, and what is left of the last one begins with the first.
    let (rounds, rest) = (models / places.len().max(1), models % places.len().max(1));
    let left = places.iter().take(rest).filter(|place| places.first() == Some(*place)).count();
    rounds * same.max(1) + left
}

impl Lodger {
    pub fn new(model: Model, device: usize, fullest: bool, turns: Turns) -> Self {
        Self { model, device, fullest, turns }
    }
}

impl StandsFor for Lodger {
    fn model(&self) -> &dyn RewardModel {
        &self.model
    }

    fn forwarded(&self, _: usize, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        let _turn = self.turns.take(self.device);
        self.model.forward(pack)
    }

    fn prepared(&self, device: usize, pack: &Pack) {
        // A device has room for what its own worker's packs need, of which one runs and one is next.
        if device == self.device {
            self.model.prepare(device, pack);
        }
    }

    fn limited(&self) -> Limits {
        // What is said of bytes is said of the fullest device.
        let limits = self.model.limits();
        Limits { device_bytes: if self.fullest { limits.device_bytes } else { 0 }, ..limits }
    }
}
