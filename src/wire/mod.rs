//! The generated wire contract (`proto/warm/v1`). Its types are only named as `wire::Score`, because several share
//! their names with the domain's.

#![allow(clippy::all, clippy::pedantic, rustdoc::all)]

tonic::include_proto!("warm.v1");

/// The compiled contract, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/warm_descriptor.bin"));

/// Bytes of one call that may come before they are read, on either side.
pub const STREAM_WINDOW: u32 = 1 << 20;
/// Bytes of all calls of a connection that may. The HTTP/2 crate ends a connection on which many small frames wait to be
/// read, and takes a part of this window for many: with the smallest window, 100 to 200 short requests behind a full window
/// of a stream are too many. An adaptive window begins with the smallest.
pub const CONNECTION_WINDOW: u32 = 16 << 20;

/// The name of a status code as gRPC spells it, for logs and metric labels.
pub fn code_name(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
