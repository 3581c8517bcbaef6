//! Tests of the engine with fakes.
