//! Memory of the devices that the model is on, asked for when somebody scrapes.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, Opts};

use super::{free_memory, memory};
use crate::model::{Place, card};

/// Free and total bytes of each device; the processor's are those of this process's control group, or of the machine.
pub(super) struct DeviceMemory {
    places: Vec<Place>,
    bytes: GaugeVec,
}

impl DeviceMemory {
    pub fn new(places: &[Place]) -> Result<Self, prometheus::Error> {
        let help = "Memory of a device: free and total. NaN where nobody tells.";
        let bytes = GaugeVec::new(Opts::new("warm_app_device_memory_bytes", help), &["device", "kind"])?;
        Ok(Self { places: places.to_vec(), bytes })
    }

    fn show(&self, device: &str, [free, total]: [Option<u64>; 2]) {
        for (kind, bytes) in [("free", free), ("total", total)] {
            let gauge = self.bytes.with_label_values(&[device, kind]);
            gauge.set(bytes.map_or(f64::NAN, |bytes| bytes as f64));
        }
    }
}

impl Collector for DeviceMemory {
    fn desc(&self) -> Vec<&Desc> {
        self.bytes.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        for place in &self.places {
            let device = place.to_string();
            let found = match place {
                // No limit at all is how it says that it does not know.
                Place::Cpu => [free_memory::free_on(&self.places), Some(memory::limit()).filter(|limit| *limit > 0)],
                _ => {
                    let card = card(*place);
                    [card.as_ref().map(|card| card.free_bytes), card.as_ref().map(|card| card.total_bytes)]
                }
            };
            self.show(&device, found);
        }
        self.bytes.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(places: &[Place]) -> Vec<(String, String, f64)> {
        let families = DeviceMemory::new(places).expect("a name").collect();
        let label = |metric: &prometheus::proto::Metric, i: usize| metric.get_label()[i].value().to_owned();
        families[0].get_metric().iter().map(|metric| (label(metric, 0), label(metric, 1), metric.get_gauge().get_value())).collect()
    }

    #[test]
    fn the_processor_has_some_memory_and_not_all_of_it_is_free() {
        let found = values(&[Place::Cpu]);
        let of = |kind: &str| found.iter().find(|(device, found, _)| device == "cpu" && found == kind).expect("a series").2;
        if cfg!(target_os = "linux") {
            assert!(of("free") > 0.0 && of("free") <= of("total"), "{found:?}");
        }
    }

    #[test]
    fn a_card_that_nobody_knows_is_shown_without_numbers() {
        let found = values(&[Place::Cuda(63)]);
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|(device, _, bytes)| device == "cuda:63" && bytes.is_nan()), "{found:?}");
        let memory = DeviceMemory::new(&[]).expect("a name");
        memory.show("cuda:0", [Some(0), Some(9)]);
        let of = |kind: &str| memory.bytes.with_label_values(&["cuda:0", kind]).get();
        assert_eq!((of("free"), of("total")), (0.0, 9.0), "a card that is full says so");
    }
}
