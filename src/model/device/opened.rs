//! Devices that this process has opened. To open one takes long (a driver compiles its kernels then) and memory that stays,
//! so one that nobody uses any more is used again.
//!
//! Two loads never hold the same one at once, though they may be on the same card: a handle of the vendor's matrix library
//! has one workspace, which two threads (one that scores, and one that tries out what comes next) would write over each other.

use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::Device;

use super::{Arithmetic, Backend, DeviceError, Place, guarded};
use crate::checkpoint::Architecture;
use crate::lock::lock;

/// What was opened, by place; held by nobody but this list where it is free.
struct Shelf<D>(Mutex<Vec<(Place, Arc<D>)>>);

impl<D> Shelf<D> {
    const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// One that nobody holds, or a new one.
    fn take(&self, place: Place, open: impl FnOnce() -> Result<D, DeviceError>) -> Result<Arc<D>, DeviceError> {
        let mut shelf = lock(&self.0);
        let free = shelf.iter().find(|(known, device)| *known == place && Arc::strong_count(device) == 1);
        if let Some((_, device)) = free {
            return Ok(Arc::clone(device));
        }
        let opened = Arc::new(open()?);
        shelf.push((place, Arc::clone(&opened)));
        Ok(opened)
    }
}

static SHELF: Shelf<Device> = Shelf::new();

/// Devices that everything is loaded onto that one worker a device runs, one pack after another: a generation's models. They
/// are held by this and by every model that was loaded onto them.
#[derive(Clone, Debug)]
pub struct Devices {
    opened: Vec<(Place, Arc<Device>)>,
    turns: Turns,
}

/// Whose turn it is on each device, where also workers of other devices run a pack there.
#[derive(Clone, Debug)]
pub(in crate::model) struct Turns(Arc<[Mutex<()>]>);

impl Turns {
    pub fn new(devices: usize) -> Self {
        Self((0..devices).map(|_| Mutex::new(())).collect())
    }

    /// Waits for a turn; `None` where there is no such device.
    pub fn take(&self, device: usize) -> Option<MutexGuard<'_, ()>> {
        // There is nothing in it that a panic could have left half done.
        Some(lock(self.0.get(device)?))
    }
}

impl Devices {
    pub fn open(places: &[Place]) -> Result<Self, DeviceError> {
        let opened = places.iter().map(|place| Ok((*place, place.opened()?))).collect::<Result<_, DeviceError>>()?;
        Ok(Self { opened, turns: Turns::new(places.len()) })
    }

    pub(in crate::model) fn turns(&self) -> Turns {
        self.turns.clone()
    }

    /// How a model would be computed on each of them, all in one way.
    pub(in crate::model) fn backends(&self, arithmetic: Arithmetic, architecture: &Architecture) -> Vec<Backend> {
        let backend = |(place, device): &(Place, Arc<Device>)| Backend::on(*place, device, arithmetic, architecture);
        let mut backends: Vec<Backend> = self.opened.iter().map(backend).collect();
        in_one_way(&mut backends);
        backends
    }
}

/// A score may not depend on which device takes it: what one of them cannot use, none does.
fn in_one_way(backends: &mut [Backend]) {
    all_or_none(backends, "flash attention", |backend| &mut backend.flash);
    all_or_none(backends, "grouped experts", |backend| &mut backend.grouped);
}

fn all_or_none<T>(backends: &mut [Backend], what: &str, part: fn(&mut Backend) -> &mut Option<T>) {
    let (mut with, mut without) = (None, None);
    for backend in backends.iter_mut() {
        let place = backend.place;
        *(if part(backend).is_some() { &mut with } else { &mut without }) = Some(place);
    }
    if let (Some(with), Some(without)) = (with, without) {
        tracing::warn!(what, %with, %without, "not used on any device, because one of them cannot");
        backends.iter_mut().for_each(|backend| *part(backend) = None);
    }
}

impl Place {
    /// The device, for as long as the result is held by whoever uses it.
    pub(super) fn opened(self) -> Result<Arc<Device>, DeviceError> {
        self.check()?;
        let open = || match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => Device::new_cuda(ordinal),
            Self::Metal(ordinal) => Device::new_metal(ordinal),
        };
        // A library of the vendor that is found but does not fit panics in the crates that load it.
        SHELF.take(self, || guarded(|| open().map_err(|error| error.to_string())).map_err(|problem| self.error(problem)))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use candle_core::DType;

    use super::*;
    use crate::model::device::OnHost;
    use crate::model::parity_tests::oracle;

    #[test]
    fn a_device_that_nobody_uses_is_used_again_and_one_in_use_is_not_shared() {
        let (shelf, opened) = (Shelf::new(), Cell::new(0));
        let take = |place| {
            let open = || {
                opened.set(opened.get() + 1);
                Ok(opened.get())
            };
            shelf.take(place, open).expect("opens")
        };
        let live = take(Place::Cuda(0));
        let next = take(Place::Cuda(0));
        assert_eq!((*live, *next), (1, 2));
        drop(live);
        assert_eq!((*take(Place::Cuda(0)), *take(Place::Cuda(1))), (1, 3));
        // However many reloads there are.
        (0..10).for_each(|_| _ = take(Place::Cuda(0)));
        assert_eq!(opened.get(), 3);
    }

    #[test]
    fn what_cannot_be_opened_leaves_nothing_behind() {
        let shelf = Shelf::new();
        assert!(shelf.take(Place::Cuda(0), || Err(Place::Cuda(0).error("no driver"))).is_err());
        assert_eq!(shelf.take(Place::Cuda(0), || Ok(7)).as_deref(), Ok(&7));
    }

    #[test]
    fn devices_that_could_compute_in_two_ways_all_take_the_one_that_all_can() {
        let plain = Backend { place: Place::Cuda(1), ..Backend::plain_on_cpu(DType::BF16) };
        let flash = Backend { flash: Some(oracle), place: Place::Cuda(0), ..plain.clone() };
        let ways = |mut backends: Vec<Backend>| {
            in_one_way(&mut backends);
            backends.iter().map(Backend::describe).collect::<Vec<_>>()
        };
        assert_eq!(ways(vec![flash.clone(), plain]), ["cuda:0 (plain attention)", "cuda:1 (plain attention)"]);
        assert_eq!(ways(vec![flash.clone(), flash.clone()]), ["cuda:0 (flash attention)"; 2]);
        let grouped = Backend { grouped: Some(&OnHost), ..flash.clone() };
        assert_eq!(ways(vec![grouped.clone(), flash]), ["cuda:0 (flash attention)"; 2]);
        assert_eq!(ways(vec![grouped.clone(), grouped]), ["cuda:0 (flash attention, grouped experts)"; 2]);
    }
}
