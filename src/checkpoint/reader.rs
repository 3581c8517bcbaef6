//! Stub: owner B.
