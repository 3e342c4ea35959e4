//! Compressed messages of a Jetstream (`compress=true`): each a Zstandard frame with Jetstream's own dictionary.
//!
//! `v1.zdict` is that dictionary, from <https://github.com/bluesky-social/jetstream> (`internal/subscribe/dictionaries/legacy_subscribe.zdict`;
//! Copyright (c) 2022-2026 Bluesky Social PBC and contributors; MIT or Apache-2.0).

use std::panic::{AssertUnwindSafe, catch_unwind};

use ruzstd::decoding::{BlockDecodingStrategy, Dictionary, FrameDecoder};

static DICTIONARY: &[u8] = include_bytes!("v1.zdict");
/// How many bytes are decompressed before the size is looked at again.
const STEP: usize = 64 << 10;

/// Decompresses messages.
pub struct Decompressor {
    decoder: FrameDecoder,
    limit: usize,
}

impl Decompressor {
    /// One for messages of at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// The dictionary cannot be read.
    pub fn new(limit: usize) -> Result<Self, String> {
        let dictionary =
            Dictionary::decode_dict(DICTIONARY).map_err(|error| format!("dictionary: {error}"))?;
        let mut decoder = FrameDecoder::new();
        decoder.add_dict(dictionary).map_err(|error| format!("dictionary: {error}"))?;
        Ok(Self { decoder, limit })
    }

    /// The text of a message.
    ///
    /// # Errors
    ///
    /// It is not a Zstandard frame, needs another dictionary, is not text, or is too large.
    pub fn text(&mut self, frame: &[u8]) -> Result<String, String> {
        // The library is not ours, and what it reads comes from outside.
        let bytes = catch_unwind(AssertUnwindSafe(|| self.bytes(frame)));
        let Ok(bytes) = bytes else {
            *self = Self::new(self.limit)?;
            return Err("its decompression failed".to_owned());
        };
        String::from_utf8(bytes?).map_err(|_| "it is not UTF-8".to_owned())
    }

    fn bytes(&mut self, frame: &[u8]) -> Result<Vec<u8>, String> {
        let mut source = frame;
        self.decoder.reset(&mut source).map_err(|error| error.to_string())?;
        while !self.decoder.is_finished() {
            let step = BlockDecodingStrategy::UptoBytes(STEP);
            self.decoder.decode_blocks(&mut source, step).map_err(|error| error.to_string())?;
            if self.decoder.can_collect() > self.limit || self.decoder.content_size() > self.limit as u64 {
                return Err(format!("it is larger than {} bytes", self.limit));
            }
        }
        self.decoder.collect().ok_or_else(|| "it is incomplete".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = include_str!("../../../tests/fixtures/jetstream/message.json");

    #[test]
    fn what_the_reference_implementation_compresses_is_read() {
        let mut decompressor = Decompressor::new(1 << 20).unwrap();
        let with_dictionary: &[u8] = include_bytes!("../../../tests/fixtures/jetstream/message.json.zst");
        assert!(with_dictionary.len() * 2 < TEXT.len(), "{} of {}", with_dictionary.len(), TEXT.len());
        for _ in 0..2 {
            assert_eq!(decompressor.text(with_dictionary).unwrap(), TEXT);
        }
        let without: &[u8] = include_bytes!("../../../tests/fixtures/jetstream/plain.zst");
        assert_eq!(decompressor.text(without).unwrap(), TEXT);
    }

    #[test]
    fn what_cannot_be_used_is_refused_and_the_next_is_read() {
        let good: &[u8] = include_bytes!("../../../tests/fixtures/jetstream/message.json.zst");
        let bomb: &[u8] = include_bytes!("../../../tests/fixtures/jetstream/zeros.zst");
        let mut decompressor = Decompressor::new(1 << 20).unwrap();
        assert!(decompressor.text(bomb).unwrap_err().contains("larger than"));
        for bad in [&b""[..], b"{}", &good[..good.len() - 1], &good[..20]] {
            assert!(decompressor.text(bad).is_err(), "{bad:?}");
        }
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..2_000 {
            let mut broken = good.to_vec();
            let at = rng.usize(..broken.len());
            broken[at] ^= rng.u8(1..);
            let _ = decompressor.text(&broken);
        }
        assert_eq!(decompressor.text(good).unwrap(), TEXT);
    }
}
