//! The edge: gRPC for callers, and a plain HTTP port for operators. The only layer that knows tonic's server and axum.

pub mod convert;
