//! Frames in: subscribing to a relay, decoding what it sends, and a simulated relay.

pub mod connect;
pub mod decode;
pub mod reader;
mod sequence;
pub mod simulate;
