//! Estimates the growth rate of a series of samples, robust against outliers.

/// The Theil–Sen estimator, the median of the slopes between all pairs: a single spike or step does not move it.
/// Samples are (seconds, value). Returns `None` for fewer than two distinct times.
pub fn theil_sen(samples: &[(f64, f64)]) -> Option<f64> {
    // The number of pairs is quadratic: thin the series out to at most 400 samples.
    let step = samples.len().div_ceil(400).max(1);
    let samples: Vec<(f64, f64)> = samples.iter().copied().step_by(step).collect();

    let mut slopes = Vec::new();
    for (i, (x0, y0)) in samples.iter().enumerate() {
        slopes.extend(
            samples[i + 1..]
                .iter()
                .filter(|(x1, _)| x1 > x0)
                .map(|(x1, y1)| (y1 - y0) / (x1 - x0)),
        );
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
    fn finds_the_trend_despite_noise_and_spikes() {
        check(|_| 7.0, 0.0);
        check(|x| 3.0 * x, 3.0);
        check(|x| 3.0 * x + (x * 12.9898).sin() * 50.0, 3.0);
        check(|x| if x as i32 % 10 == 0 { 1e6 } else { 5.0 }, 0.0);

        assert_eq!(theil_sen(&[(0.0, 1.0)]), None);
        assert_eq!(theil_sen(&[(1.0, 1.0), (1.0, 2.0)]), None);
    }
}
