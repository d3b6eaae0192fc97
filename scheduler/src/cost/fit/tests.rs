use super::*;

/// Those that are measured for the planner.
const AT: [(f64, f64); 12] = [
    (1.0, 32.0),
    (1.0, 512.0),
    (4.0, 128.0),
    (8.0, 32.0),
    (8.0, 256.0),
    (16.0, 32.0),
    (16.0, 128.0),
    (16.0, 512.0),
    (32.0, 96.0),
    (64.0, 32.0),
    (64.0, 128.0),
    (64.0, 256.0),
];

const LINEAR: CostModel = CostModel {
    step: 1e-4,
    row: 4e-5,
    cached_token: 1e-7,
    prompt_token: 2e-5,
    many_rows: None,
    many_cached_tokens: None,
};

fn points(model: &CostModel) -> Vec<CostPoint> {
    let at = |(batch_size, context): (f64, f64)| CostPoint {
        batch_size,
        context,
        prefill: batch_size * context * model.prompt_token,
        step: model.decode_step(batch_size, context),
    };
    AT.map(at).to_vec()
}

fn assert_found(model: &CostModel) {
    let got = CostModel::fit(&points(model)).expect("enough points");
    let numbers = |model: &CostModel| {
        let rise = |rise: Option<Rise>| rise.map_or([0.0; 2], |r| [r.beyond, r.more]);
        let ([a, b], [c, d]) = (rise(model.many_rows), rise(model.many_cached_tokens));
        [
            model.step,
            model.row,
            model.cached_token,
            model.prompt_token,
            a,
            b,
            c,
            d,
        ]
    };
    for (got, want) in numbers(&got).into_iter().zip(numbers(model)) {
        assert!((got - want).abs() <= 1e-6 * want.abs().max(1e-9), "{got}, want {want}");
    }
}

#[test]
fn what_made_the_points_is_found_again() {
    assert_found(&LINEAR);
    // A CPU: twice the price per cached token once 4 MB of them no longer fit, and half as much again per row.
    let cached = Some(Rise {
        beyond: 2048.0,
        more: 1.5e-7,
    });
    let rows = Some(Rise {
        beyond: 16.0,
        more: 2e-5,
    });
    assert_found(&CostModel {
        many_cached_tokens: cached,
        ..LINEAR
    });
    assert_found(&CostModel {
        many_cached_tokens: cached,
        many_rows: rows,
        ..LINEAR
    });
    // A GPU: rows cost nothing until there are 32.
    assert_found(&CostModel {
        step: 3e-3,
        row: 0.0,
        cached_token: 2e-8,
        many_rows: Some(Rise {
            beyond: 32.0,
            more: 5e-5,
        }),
        ..LINEAR
    });
}

#[test]
fn noise_is_no_price_that_rises() {
    // Every point 4 % too slow or too fast, in an order that has nothing to do with its size.
    for seed in 0..20usize {
        let mut points = points(&LINEAR);
        for (i, point) in points.iter_mut().enumerate() {
            let mixed = (i * i * 7 + i * (2 * seed + 3) + seed) * 2_654_435_761;
            let bit = (mixed >> 13) & 1;
            point.step *= if bit == 0 { 0.96 } else { 1.04 };
        }
        let got = CostModel::fit(&points).expect("enough points");
        assert_eq!((got.many_rows, got.many_cached_tokens), (None, None), "{seed}: {got:?}");
        assert!((got.row / LINEAR.row - 1.0).abs() < 0.2, "{got:?}");
    }
}

#[test]
fn as_few_points_as_numbers_are_fitted_by_the_plain_sum() {
    let risen = CostModel {
        many_cached_tokens: Some(Rise {
            beyond: 2048.0,
            more: 1e-6,
        }),
        ..LINEAR
    };
    let got = CostModel::fit(&points(&risen)[5..10]).expect("enough points");
    assert_eq!((got.many_rows, got.many_cached_tokens), (None, None));
}

#[test]
fn no_term_is_negative_and_too_few_points_are_none() {
    let mut model = CostModel { step: -1e-5, ..LINEAR };
    let got = CostModel::fit(&points(&model)).expect("enough points");
    assert!(got.step == 0.0 && got.row > 0.0, "{got:?}");
    model.step = 0.0;
    assert_eq!(CostModel::fit(&points(&model)[..2]), None);
    let same = [points(&model)[0]; 4];
    assert_eq!(CostModel::fit(&same), None, "one point four times tells nothing apart");
}
