"""How fast gn_fast is: beside a copy of the same bytes, beside other libraries, beside itself."""
