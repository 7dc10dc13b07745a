"""How fast gn_fast is: beside a copy of the bytes and the practical limit, other libraries, and itself."""
