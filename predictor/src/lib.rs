//! predictor.
