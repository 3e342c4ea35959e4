//! Uneven draws: some are busier than others, and the near is seen before the far.

/// A number below `end`, small ones more often: the given power of an even draw.
pub(super) fn skewed(rng: &mut fastrand::Rng, end: u32, power: u32) -> u32 {
    // Multiplications alone, which give the same everywhere; the standard library's powers need not.
    let even = rng.f64();
    let drawn = (0..power).fold(1.0, |product, _| product * even);
    ((drawn * f64::from(end)) as u32).min(end.saturating_sub(1))
}

/// A number below `end` (at least 1), as likely to be in 0..1 as in 1..3, in 3..7 and so on: how people come upon
/// things, the nearest first.
pub(super) fn young(rng: &mut fastrand::Rng, end: u64) -> u64 {
    let scales = u64::BITS - end.leading_zeros();
    let scale = rng.u32(0..scales.max(1));
    let drawn = (1_u64 << scale) - 1 + rng.u64(0..1 << scale);
    drawn % end.max(1)
}
