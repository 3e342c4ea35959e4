//! Frames in: subscribing to a relay, decoding what it sends, and a simulated relay.

pub mod decode;
pub mod reader;
pub mod simulate;
