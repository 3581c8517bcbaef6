//! The edge: gRPC for callers, and a plain HTTP port for operators. The only layer that knows tonic's server and axum.

mod admin;
mod body;
mod calls;
pub mod convert;
mod gate;
mod grpc;
mod health;
mod metrics;
mod models;
mod page;
mod readiness;
mod status;
mod stream;
pub mod tenants;

pub use admin::{Admin, AdminError};
pub use calls::{CallBook, CallLogOptions};
pub use gate::{Gate, GateLayer, GateOptions};
pub use grpc::{Edge, GrpcOptions, ServeError, serve};
pub use metrics::ServeMetrics;
pub use readiness::{Phase, Readiness};
pub use status::status;
pub use tenants::Tenants;
