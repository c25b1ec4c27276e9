"""From a teacher to a student: parameters, features and outputs; `penjing.transfer` drives them."""
