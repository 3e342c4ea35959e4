//! Frames in: subscribing to a relay and decoding what it sends.

pub mod connect;
pub mod decode;
pub mod reader;
mod sequence;
