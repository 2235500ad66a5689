//! How fast a series of samples grows, whatever a few of them say.

/// The median of the slopes between all pairs (Theil and Sen): one spike, or one restart's step, does not move it.
/// Samples are (seconds, value); `None` for fewer than two moments.
pub fn theil_sen(samples: &[(f64, f64)]) -> Option<f64> {
    // All pairs of some hundred samples are enough, and quick.
    let step = samples.len().div_ceil(400).max(1);
    let samples: Vec<(f64, f64)> = samples.iter().copied().step_by(step).collect();
    let mut slopes = Vec::new();
    for (i, (x0, y0)) in samples.iter().enumerate() {
        slopes.extend(samples[i + 1..].iter().filter(|(x1, _)| x1 > x0).map(|(x1, y1)| (y1 - y0) / (x1 - x0)));
    }
    median(&mut slopes)
}

pub fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(value: impl Fn(f64) -> f64, expected: f64) {
        let samples: Vec<(f64, f64)> = (0..1000).map(|n| (f64::from(n), value(f64::from(n)))).collect();
        let slope = theil_sen(&samples).unwrap();
        assert!((slope - expected).abs() < 0.01, "{slope}");
    }

    #[test]
    fn a_trend_is_found_through_noise_and_spikes() {
        check(|_| 7.0, 0.0);
        check(|x| 3.0 * x, 3.0);
        check(|x| 3.0 * x + (x * 12.9898).sin() * 50.0, 3.0);
        check(|x| if x as i32 % 10 == 0 { 1e6 } else { 5.0 }, 0.0);
        assert_eq!(theil_sen(&[(0.0, 1.0)]), None);
        assert_eq!(theil_sen(&[(1.0, 1.0), (1.0, 2.0)]), None);
    }
}
