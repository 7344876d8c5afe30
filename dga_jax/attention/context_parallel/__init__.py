"""The op on sequences split over a mesh axis: what each device needs of the others."""
