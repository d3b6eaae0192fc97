//! The two questions of the method (arXiv 2305.13144), put after the instruction.

/// Asks for the length alone; a model is tuned to answer it.
pub const LENGTH_QUESTION: &str = "\nDon't output the response for the above instruction. Instead, you need to predict \
the number of tokens in your response. Output one number only.";

/// Perception in advance: asks for the length first and the response after it; no tuning.
pub const PIA_QUESTION: &str = "\nBefore responding to the above instruction, you have to predict the length of your \
response. Print the estimated number of tokens in your response in the first line. Then change to a new line to \
respond to the instruction.";
