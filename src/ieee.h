/* The arithmetic that every promise rests on. setup.py asks for it after all flags of the user's; this refuses a build
   that does without. */
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error gn_fast needs IEEE 754 arithmetic: -ffast-math, -Ofast and their parts change its bits and lose NaNs
#endif
