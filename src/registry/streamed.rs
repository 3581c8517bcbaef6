//! The one place for members that do not stand on the device: each is loaded for a call, and the next one only once nobody
//! holds it any more.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};

use super::EngineError;
use super::members::StreamedMembers;
use crate::domain::MemberName;
use crate::model::{RewardModel, StandsFor};
use crate::scorer::panic_message;

/// Room for one member.
#[derive(Debug, Default)]
pub(super) struct Place(Arc<Mutex<()>>);

impl Place {
    /// Waits until the place is free, and loads the member `name`, which is the one of this index.
    pub async fn load(
        &self,
        members: Arc<dyn StreamedMembers>,
        index: usize,
        name: &MemberName,
    ) -> Result<Arc<dyn RewardModel>, EngineError> {
        let taken = self.0.clone().lock_owned().await;
        let (done, loaded) = oneshot::channel();
        let load = move || {
            let result = catch_unwind(AssertUnwindSafe(|| members.load(index)));
            // A caller that has gone leaves the place free, but only once there is nothing in it.
            let _ = done.send(result.map(|result| result.map(|model| Placed { model, _taken: taken })));
        };
        let failed = |problem: String| EngineError::Forward(format!("member {name} cannot be loaded: {problem}"));
        std::thread::Builder::new().name("warm-stream".to_owned()).spawn(load).map_err(|error| failed(error.to_string()))?;
        match loaded.await {
            Ok(Ok(Ok(model))) => Ok(Arc::new(model)),
            Ok(Ok(Err(problem))) => Err(failed(problem)),
            Ok(Err(panic)) => Err(failed(format!("panicked: {}", panic_message(panic.as_ref())))),
            Err(_) => Err(failed("the loading thread has gone".to_owned())),
        }
    }
}

/// A member that keeps its place for as long as anybody holds it: a call has its answer a moment before the device's worker
/// lets go of the model. Dropped in this order.
struct Placed {
    model: Arc<dyn RewardModel>,
    _taken: OwnedMutexGuard<()>,
}

impl StandsFor for Placed {
    fn model(&self) -> &dyn RewardModel {
        self.model.as_ref()
    }
}
