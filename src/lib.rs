//! `warm` serves weight-averaged reward models (WARM, arXiv 2401.12187) over gRPC.
//!
//! The layers, in reading order; each names only those above it (`tests/tidy.rs` holds this law):
//!
//! | layer | what it knows |
//! |---|---|
//! | [`clock`] | the one place that asks for the time |
//! | [`domain`] | facts of the problem: conversations, scores, ensembles, ids. No I/O, no async |
//! | [`wire`], [`client`] | the generated wire contract and a client for it |
//! | [`checkpoint`] | untrusted files in, validated facts out |
//! | [`merge`] | many checkpoints to one: recipe, plan, average |
//! | [`text`] | words to tokens: chat template, tokenizer, truncation |
//! | [`model`] | tokens to rewards; the only layer that knows candle |
//! | [`scorer`] | the device queue and the worker that owns the device |
//! | [`registry`] | which generation is live, and scoring by it |
//! | [`serve`] | the edge: gRPC and the admin port |
//! | [`offline`] | the same layers without a network |
//! | [`config`], [`app`], [`commands`] | settings, assembly, and the verbs of the binary |
#![deny(unsafe_code)]

pub mod app;
pub mod checkpoint;
pub mod client;
pub mod clock;
pub mod commands;
pub mod config;
pub mod domain;
mod lock;
pub mod merge;
pub mod model;
pub mod offline;
pub mod registry;
pub mod scorer;
pub mod serve;
pub mod shutdown;
pub mod telemetry;
pub mod text;
pub mod wire;
