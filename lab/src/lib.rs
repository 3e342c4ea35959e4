//! Tools to demonstrate, test and measure standpipe. The program and its image contain none of this.
//!
//! - [`simulate`]: a simulated relay
//! - [`servers`]: private Redis and PostgreSQL servers
//! - [`demo`]: the whole chain, to watch
//! - [`bench`]: the measurements
//! - [`program`], [`wait`]: for tests: a program as a child process, waiting for a condition

// Anything that would end the process needs a reason in place. Tests are exempt.
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo, clippy::dbg_macro)]

pub mod bench;
pub mod demo;
pub mod program;
pub mod servers;
pub mod simulate;
pub mod wait;
