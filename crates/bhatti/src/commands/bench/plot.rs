//! A plot of the distributions: for each section, the share of its samples that took at most a
//! given time.

use std::fs;
use std::path::Path;

use plotters::prelude::*;

use super::figures::Figures;
use crate::error::CliError;

const SIZE: (u32, u32) = (960, 600);

/// Shortest time that is drawn, in milliseconds: a logarithmic axis cannot show zero.
const LEAST_MS: f64 = 0.1;

/// Draws `figures` into the file at `path`.
pub(super) fn draw(path: &Path, heading: &str, figures: &[Figures]) -> Result<(), CliError> {
    let mut picture = String::new();
    picture_of(&mut picture, heading, figures)
        .map_err(|error| CliError::new(format!("failed to draw the plot: {error}")))?;
    fs::write(path, picture)
        .map_err(|error| CliError::new(format!("failed to write `{}`: {error}", path.display())))
}

fn picture_of(
    to: &mut String,
    heading: &str,
    figures: &[Figures],
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(to, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let times = || figures.iter().flat_map(|figures| figures.times_ms.iter().copied());
    let least = times().fold(f64::INFINITY, f64::min).clamp(LEAST_MS, 1e6);
    let most = times().fold(least, f64::max);
    let range = (least * 0.8..most * 1.25).log_scale();
    let mut chart = ChartBuilder::on(&root)
        .caption(heading, ("sans-serif", 15))
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(56)
        .build_cartesian_2d(range, 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc("milliseconds")
        .y_desc("% of samples within this time")
        .x_label_formatter(&|ms| if *ms < 1.0 { format!("{ms:.1}") } else { format!("{ms:.0}") })
        .draw()?;
    for (number, figures) in figures.iter().enumerate() {
        let colour = Palette99::pick(number).to_rgba();
        let label = format!("{}, n = {}", figures.what, figures.times_ms.len());
        chart
            .draw_series(LineSeries::new(steps(&figures.times_ms), colour.stroke_width(2)))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

/// Returns the corners of the empirical distribution of sorted times.
fn steps(times_ms: &[f64]) -> Vec<(f64, f64)> {
    #[expect(clippy::cast_precision_loss, reason = "there are at most a thousand samples")]
    let part = |number: usize| 100.0 * number as f64 / times_ms.len() as f64;
    let corners = |(number, ms): (usize, &f64)| {
        let ms = ms.max(LEAST_MS);
        [(ms, part(number)), (ms, part(number + 1))]
    };
    times_ms.iter().enumerate().flat_map(corners).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn plot_shows_every_section_and_a_write_error_names_the_file() {
        let times = |ms: &[u64]| ms.iter().copied().map(Duration::from_millis).collect();
        let figures = [
            Figures::of("create", times(&[60, 70, 400])),
            Figures::of("exec", times(&[12])),
            Figures::of("nothing", Vec::new()),
        ];
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("plot.svg");

        draw(&file, "a <machine>", &figures).unwrap();

        let svg = fs::read_to_string(file).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["create, n = 3", "exec, n = 1", "a &lt;machine&gt;", "milliseconds"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        let refused = draw(&place.path().join("no/plot.svg"), "", &figures).unwrap_err();
        assert!(refused.message.contains("no/plot.svg"), "{}", refused.message);
    }

    #[test]
    fn distribution_rises_from_0_to_100_percent() {
        let corners = steps(&[1.0, 3.0]);
        assert_eq!(corners, [(1.0, 0.0), (1.0, 50.0), (3.0, 50.0), (3.0, 100.0)]);
    }
}
