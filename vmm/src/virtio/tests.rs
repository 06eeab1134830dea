//! The function driven as a guest would, against a hypervisor that writes down what it is asked.
