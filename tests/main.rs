//! The integration tests: one binary, so that everything links once. Areas:
//!
//! - `serve`: a real server of real checkpoints, over a socket: parity with the golden scores through the wire, and the
//!   binary itself, from its arguments to its exit code after SIGTERM; mistakes of callers and broken checkpoints.
//!   Reloads of real checkpoints, their faults, and what a crash in the middle leaves.
//! - `deploy`: manifests, image, rules and dashboard of `deploy/` name only what the program has.
//! - `merge`: the commands around a merge (plan, report, merge), and a start from the cache of merged weights.
//! - `program`: the binary where recipes name places on a hub, and the fleet's Job and pods with their own arguments.
//! - `readme`: the tables of the README are what the code says.

mod deploy;
mod merge;
mod program;
mod readme;
mod serve;
