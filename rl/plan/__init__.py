"""`emberl plan`: a simulation of the schedule on devices that are not there."""
